"""vLLM's own MXFP4 layers for `hopper-mxfp4 bench`, as its models build them.

Each runs one of vLLM's MoE backends. Nothing here imports vLLM before a baseline is built. See
hopper_mxfp4.bench.baselines for what a baseline is.
"""

import tempfile
from collections.abc import Callable
from functools import cache, partial
from itertools import count
from pathlib import Path
from typing import Any

import torch

from hopper_mxfp4 import ExpertWeights
from hopper_mxfp4.bench.baselines import Baseline, Bind, Layer
from hopper_mxfp4.bench.workloads import Batch, Workload
from hopper_mxfp4.loading import matching_chunks

_serial = count()  # vLLM wants a name of its own for every layer


def build(backend: str, layer: Layer, declared: str | None = None) -> Bind:
    """vLLM's layer with that --moe-backend.

    Where the backend can't take the layer, vLLM's own exception is raised.

    declared: the activations that the checkpoint declares, by the name of vLLM's key for them; None
    for none.

    Where the backend pads hidden size, inputs are padded before the clock starts: vLLM's graph does
    it fused with what comes before. The triton backend routes itself: its time includes softmax and
    top-k.
    """
    config = _config(backend)
    experts = _experts(config, layer, declared)
    _fill(experts, layer.workload, layer.weights)
    with _on(config, layer.device):
        experts.quant_method.process_weights_after_loading(experts)
    return partial(_bind, config, experts)


def _bind(config: Any, experts: Any, call: Batch) -> Callable[[], torch.Tensor]:
    from vllm.forward_context import set_forward_context

    tokens, hidden = call.x.shape
    x = torch.nn.functional.pad(call.x, (0, experts.moe_config.hidden_dim - hidden))

    def run() -> torch.Tensor:
        with set_forward_context(None, config, num_tokens=tokens):
            if experts.quant_method.is_monolithic:
                return experts.forward_monolithic(x, call.logits)
            return experts.forward_modular(x, call.weights, call.ids)

    return run


@cache
def _config(backend: str) -> Any:
    """What `vllm serve --moe-backend ..` makes of a small GPT-OSS checkpoint.

    The layers bring their own sizes.
    """
    from vllm.engine.arg_utils import EngineArgs

    from hopper_mxfp4.checkpoint.random_gpt_oss import write_gpt_oss

    folder = Path(tempfile.mkdtemp(prefix="hopper-mxfp4-bench-"))
    write_gpt_oss(folder, layers=1, hidden=64, intermediate=64, experts=4, top_k=2)
    return EngineArgs(
        model=str(folder),
        skip_tokenizer_init=True,
        max_model_len=1024,
        max_num_batched_tokens=8192,
        enforce_eager=True,
        moe_backend=backend,
    ).create_engine_config()


class _on:
    """vLLM's configuration and the device it builds on, with one rank of one."""

    def __init__(self, config: Any, device: torch.device):
        self.config, self.device = config, device

    def __enter__(self) -> None:
        from vllm.config import set_current_vllm_config

        self.context = set_current_vllm_config(self.config)
        self.context.__enter__()
        _one_process(self.device)
        self.dtype = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        self.device.__enter__()

    def __exit__(self, *exception: Any) -> None:
        self.device.__exit__(*exception)
        torch.set_default_dtype(self.dtype)
        self.context.__exit__(*exception)


@cache
def _one_process(device: torch.device) -> None:
    from vllm.distributed import parallel_state
    from vllm.v1.worker.workspace import init_workspace_manager

    if parallel_state.model_parallel_is_initialized():
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    parallel_state.init_distributed_environment(
        world_size=1,
        rank=0,
        local_rank=0,
        backend=backend,
        distributed_init_method=f"file://{tempfile.mktemp()}",
    )
    parallel_state.initialize_model_parallel(1)
    init_workspace_manager(device)


def _declaring(stock: type[Any], declared: str | None) -> Any:
    """vLLM's config for a checkpoint that declares its activations.

    It makes the layers' method as vLLM's DeepSeek-V4 config does.
    """
    from vllm.model_executor.layers.quantization import mxfp4
    from vllm.model_executor.layers.quantization.utils import quant_utils

    if declared is None:
        return stock()
    key = getattr(quant_utils, declared)

    class Declaring(stock):
        def _make_moe_method(self, moe: Any) -> Any:
            return mxfp4.Mxfp4MoEMethod(moe, activation_key=key)

    return Declaring()


def _experts(config: Any, layer: Layer, declared: str | None) -> Any:
    """The layer as vLLM's GPT-OSS and DeepSeek-V4 models ask for it."""
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    from vllm.model_executor.layers.fused_moe import layer as fused_moe_layer
    from vllm.model_executor.layers.quantization.mxfp4 import GptOssMxfp4Config, Mxfp4Config

    workload = layer.workload
    make = getattr(fused_moe_layer, "FusedMoEFactory", None) or fused_moe_layer.FusedMoE
    family: dict[str, Any]
    if workload.family.rows == "interleaved":
        family = {"quant_config": GptOssMxfp4Config(), "activation": "swigluoai", "has_bias": True}
        if not workload.family.bias:
            raise NotImplementedError("vLLM's GPT-OSS layer always has biases")
        if declared:
            raise NotImplementedError("GPT-OSS checkpoints declare no activations")
    else:
        family = {
            "quant_config": _declaring(Mxfp4Config, declared),
            "swiglu_limit": workload.swiglu.limit,
        }
    with _on(config, layer.device):
        module = make(
            num_experts=workload.experts,
            top_k=workload.top_k,
            hidden_size=workload.hidden,
            intermediate_size=workload.intermediate,
            renormalize=True,
            prefix=f"bench.{next(_serial)}.experts",
            **family,
        )
    return next(m for m in module.modules() if isinstance(m, RoutedExperts))


def _fill(experts: Any, workload: Workload, w: ExpertWeights) -> None:
    """Copy the checkpoint's tensors into the corner of vLLM's parameters, as its loaders do."""
    for name, source in w.tensors().items():
        kind, _, what = name.partition("_")
        param = getattr(
            experts,
            {"": f"{kind}_weight", "scale": f"{kind}_weight_scale", "bias": f"{kind}_bias"}[what],
        ).data
        param.zero_()
        for target, given in matching_chunks(name, param, source, workload.family):
            target[tuple(slice(n) for n in given.shape)].copy_(given)


BASELINES = {
    f"vllm-{backend}": Baseline(partial(build, backend))
    for backend in ("marlin", "triton", "humming")
}
# What vLLM 0.33 runs for DeepSeek-V4 on Hopper when it is told nothing: its checkpoints declare
# MXFP8 activations, which Humming runs there as FP8 in groups of 128. That is not what this package
# computes.
BASELINES["vllm-humming-fp8"] = Baseline(partial(build, "humming", declared="kMxfp8Dynamic"), "fp8")
