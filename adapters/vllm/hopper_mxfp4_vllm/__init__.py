"""The vLLM adapter: `--quantization hopper_mxfp4`, or HOPPER_MXFP4=auto|on without it."""

import logging


def register() -> None:
    """vLLM's entry point: called in every process, perhaps more than once, before any CUDA call.

    vLLM lets what is raised here stop it, even where nobody asked for the plugin.
    """
    from hopper_mxfp4 import env

    try:
        from vllm.model_executor.layers.quantization import register_quantization_config

        from .selection import NAME, Selector

        register_quantization_config(NAME)(Selector)
    except Exception as error:
        reason = f"hopper-mxfp4 can't register with this vLLM: {error!r}; upgrade one of the two"
        if env.MODE.read() == "on":
            raise RuntimeError(f"{reason}, or unset {env.MODE.name}") from error
        logging.getLogger("vllm.hopper_mxfp4").warning("%s. Stock kernels serve.", reason)
