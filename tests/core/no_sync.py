"""What tells on a CPU whether code would wait for a GPU, and a kernel that does not, for the code
around kernels to be told of. The adapters' tests use both.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hopper_mxfp4 import PreparedExperts, registry
from hopper_mxfp4.arrange import restore_weights
from hopper_mxfp4.contract import Call, Run
from hopper_mxfp4.kernels.reference.kernel import ReferenceKernel
from hopper_mxfp4.kernels.reference.moe import dequantize_expert
from sm90 import Plugin

_WAITS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_COPIES = ("aten::_to_copy", "aten::copy_")
_linear = torch.nn.functional.linear


class NoSync(TorchDispatchMode):
    """Refuses what a host waits for a GPU for: to read a value (item, tolist, bool), a result whose
    size depends on values (nonzero, a mask as index), and a copy between devices.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        kwargs = kwargs or {}
        assert not _WAITS & set(func.tags), f"{func} waits for the device"
        if func.name() in _COPIES:
            devices = {a.device for a in args if isinstance(a, torch.Tensor)}
            devices |= {kwargs["device"]} if kwargs.get("device") else set()
            assert len(devices) == 1, f"{func} waits for a copy"
        return func(*args, **kwargs)


class DenseKernel(ReferenceKernel):
    """Every expert for every token, so that the host need not know the ids."""

    name = "dense"
    auto_devices: frozenset[str] = frozenset()

    def make_runner(self, p: PreparedExperts, num_tokens: int, top_k: int) -> Run:
        w = restore_weights(p)
        experts = [dequantize_expert(w, e, p.family) for e in range(p.shape.num_experts)]

        def run(call: Call, p: PreparedExperts) -> None:
            total = torch.zeros(call.out.shape, dtype=torch.float32)
            x = call.x.float()
            for e, expert in enumerate(experts):
                gate, up = (
                    _linear(x, expert.gate, expert.gate_bias),
                    _linear(x, expert.up, expert.up_bias),
                )
                down = _linear(p.swiglu(gate, up), expert.down, expert.down_bias)
                share = torch.where(call.topk_ids == e, call.topk_weights, 0.0).sum(1, keepdim=True)
                total += torch.where(share != 0, share * down, 0.0)
            call.out.copy_(total)

        return run


@contextmanager
def dense_kernel() -> Iterator[None]:
    """Have the kernel "dense" registered."""
    plugin = Plugin(DenseKernel())
    registry.manager.register(plugin)
    try:
        yield
    finally:
        registry.manager.unregister(plugin)
