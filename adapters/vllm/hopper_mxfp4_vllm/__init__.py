"""The vLLM adapter: `--quantization hopper_mxfp4`, or HOPPER_MXFP4=auto|on without it."""


def register() -> None:
    """vLLM's entry point: called in every process it starts, perhaps more than once, before any CUDA call."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from .selector import NAME, Selector

    register_quantization_config(NAME)(Selector)
