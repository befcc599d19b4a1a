"""What the core's tools know of this adapter. Importing it imports no framework."""

from collections.abc import Callable

from hopper_mxfp4.plugin import Adapter, hookimpl


@hookimpl
def register_adapters(register: Callable[[Adapter], None]) -> None:
    register(
        Adapter(
            framework="sglang",
            distributions=("sglang",),
            group="sglang.srt.plugins",
            entry_point="hopper_mxfp4",
            allowlist="SGLANG_PLUGINS",
            switch="HOPPER_MXFP4=on",
            check="hopper_mxfp4_sglang:check",
            engine="hopper_mxfp4_sglang.engine",
            all_allowed=(None, ""),
        )
    )
