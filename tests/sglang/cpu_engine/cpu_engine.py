"""An SGLang plugin by which its whole engine runs GPT-OSS without a GPU, for the way through it.

SGLang reads MXFP4 checkpoints on GPUs only, and asks kernels of theirs for attention with sinks and
for rotary embeddings. Here attention has no sinks and positions are not rotated.
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


def attention(runner):
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    class WithoutSinks(TorchNativeAttnBackend):
        def forward_extend(self, *args, sinks=None, **kwargs):
            return super().forward_extend(*args, **kwargs)

        def forward_decode(self, *args, sinks=None, **kwargs):
            return super().forward_decode(*args, **kwargs)

        def get_cuda_graph_seq_len_fill_value(self):
            return 1

    return WithoutSinks(runner)
