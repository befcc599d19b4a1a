"""An SGLang plugin by which its whole engine runs GPT-OSS without a GPU, for the way through it.

SGLang reads MXFP4 checkpoints on GPUs only, asks kernels of theirs for attention with sinks, for
rotary embeddings and for gathering tokens, and pins host memory. Here attention has no sinks,
positions are not rotated, ranks speak Gloo, and nothing is pinned. With this folder and stand_ins/
on PYTHONPATH it is loaded in every process of SGLang's.
"""

import sys
from types import ModuleType


def register() -> None:
    import sglang.srt.layers.quantization as quantization
    from sglang.srt.layers.attention import attention_registry
    from sglang.srt.layers.moe.token_dispatcher import standard
    from sglang.srt.layers.quantization.mxfp4 import Mxfp4Config

    quantization.QUANTIZATION_METHODS.setdefault("mxfp4", Mxfp4Config)
    attention_registry.ATTENTION_BACKENDS["triton"] = attention
    standard.get_device = lambda: "cpu"
    rotary = ModuleType("vllm._custom_ops")
    rotary.rotary_embedding = lambda *args: None
    sys.modules |= {"vllm": ModuleType("vllm"), rotary.__name__: rotary}
    several_ranks()
    prefill_and_decode_apart()


def attention(runner):
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    class WithoutSinks(TorchNativeAttnBackend):
        def forward_extend(self, *args, sinks=None, **kwargs):
            return super().forward_extend(*args, **kwargs)

        def forward_decode(self, *args, sinks=None, **kwargs):
            return super().forward_decode(*args, **kwargs)

        def get_cpu_graph_seq_len_fill_value(self):
            return 1

    return WithoutSinks(runner)


def several_ranks() -> None:
    """What DP attention does besides."""
    from sglang.srt.distributed.parallel_state import GroupCoordinator
    from sglang.srt.layers import dp_attention
    from sglang.srt.model_executor import forward_batch_info
    from torch import distributed

    def gather(group, output, tensor):
        distributed.all_gather_into_tensor(output, tensor, group=group.device_group)

    def reduce_scatter(group, output, tensor):
        whole = tensor.clone()
        distributed.all_reduce(whole, group=group.device_group)
        output.copy_(whole.chunk(group.world_size)[group.rank_in_group])

    GroupCoordinator.all_gather_into_tensor = gather
    GroupCoordinator.reduce_scatter_tensor = reduce_scatter
    dp_attention.memcpy_func = dp_attention.memcpy_cpu
    forward_batch_info._is_cpu = True


def prefill_and_decode_apart() -> None:
    """What sending and receiving a KV cache does besides."""
    import torch
    from sglang.srt.disaggregation import prefill
    from sglang.srt.mem_cache.pool_host import common

    class Event:
        def record(self, *_):
            """Whatever was asked for has been done."""

        wait = synchronize = record

        def query(self):
            return True

    class Torch:
        """torch for the one module that asks for pinned tensors."""

        def __getattr__(self, name):
            return getattr(torch, name)

        def empty(self, *args, pin_memory=False, **kwargs):
            return torch.empty(*args, **kwargs)

    common._cuda_host_register = lambda *_, **__: None
    torch.cuda.Event = Event
    torch.cuda.current_stream = lambda *_: None
    prefill.torch = Torch()
