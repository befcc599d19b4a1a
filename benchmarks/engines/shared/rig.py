"""What the rigs on a made GPT-OSS checkpoint share: arguments, and the head of their reports."""

import argparse
import json
import time
from importlib import metadata
from pathlib import Path
from typing import Any

SIZES = ("layers", "hidden", "intermediate", "experts", "top_k")
# What models' configs call them, the first that a config has, and what else DeepSeek-V4's vary in.
IN_A_CONFIG = {
    "layers": ("num_hidden_layers",),
    "hidden": ("hidden_size",),
    "intermediate": ("moe_intermediate_size", "intermediate_size"),
    "experts": ("n_routed_experts", "num_local_experts", "num_experts"),
    "top_k": ("num_experts_per_tok", "experts_per_token"),
    "hash_layers": ("num_hash_layers",),
    "compress_ratios": ("compress_ratios",),
}


def parser(description: str, modes: str) -> argparse.ArgumentParser:
    """modes: those that run unless others are asked for."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("folder", type=Path, help="where to work: checkpoint, logs, results")
    made.add_argument("out", type=Path, help="the report, written anew after every mode")
    made.add_argument("--modes", default=modes)
    made.add_argument("--checkpoint", type=sizes, default="1,2880,2880,32,4", help=",".join(SIZES))
    return made


def sizes(text: str) -> dict[str, int]:
    return dict(zip(SIZES, map(int, text.split(",")), strict=True))


def sizes_of(checkpoint: Path) -> dict[str, Any]:
    """What its config.json says of them."""
    config = json.loads((checkpoint / "config.json").read_text())
    found = {}
    for size, names in IN_A_CONFIG.items():
        if name := next((name for name in names if name in config), None):
            found[size] = config[name]
    return found


def report(packages: tuple[str, ...], checkpoint: dict[str, Any]) -> dict:
    """When, on what and with which versions a rig ran. checkpoint: its sizes, or those of each."""
    import torch

    from hopper_mxfp4 import __version__

    versions = {"hopper-mxfp4": __version__, "torch": torch.__version__}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "missing"
    return {
        "when": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "versions": versions,
        "checkpoint": checkpoint,
    }
