"""The command line: `hopper-mxfp4 COMMAND`. A command's module is imported when it is asked for."""

import importlib

import click

from hopper_mxfp4 import __version__

COMMANDS = ("check", "demo", "warmup", "tune", "bench")  # each a module beside this one


class Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"hopper_mxfp4.cli.{cmd_name}")
        found: click.Command = getattr(module, cmd_name)
        return found


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, package_name="hopper-mxfp4")
def main() -> None:
    """MXFP4 mixture-of-experts layers on NVIDIA Hopper, for GPT-OSS and DeepSeek-V4."""
