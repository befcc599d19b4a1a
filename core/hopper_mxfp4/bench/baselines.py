"""Who is measured: our kernels, stock FlashInfer, and what the adapters bring of their frameworks.

A contender is a name and a function: ``build(layer)`` gives ``bind``, ``bind(call)`` gives a
function without arguments that runs the call and returns its output, bf16 [M, at least H]. What
bind does is not timed. An adapter's module (`plugins.Adapter.baselines`) offers ``BASELINES``, a
dict of `Baseline`s by name; one that can't run here raises, and is listed as absent with what it
raised.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch

from hopper_mxfp4 import (
    ExpertWeights,
    KernelUnavailable,
    LayerShape,
    PreparedExperts,
    fused_moe,
    prepare_experts,
)
from hopper_mxfp4.bench.timing import Timed
from hopper_mxfp4.bench.workloads import Batch, Workload, copy_weights
from hopper_mxfp4.contract import ACTIVATIONS
from hopper_mxfp4.kernels.flashinfer import compat
from hopper_mxfp4.kernels.flashinfer.kernel import stock_arguments
from hopper_mxfp4.registry import adapters, kernels

Bind = Callable[[Batch], Timed]


@dataclass
class Layer:
    """One copy of a workload's layer. weights: the checkpoint's, which no contender may change."""

    workload: Workload
    weights: ExpertWeights
    _prepared: dict[str, PreparedExperts] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return self.weights.w13.device

    def prepared(self, kernel: str) -> PreparedExperts:
        """The layer prepared for a kernel of ours and `activations_of` it, once. Raises
        KernelUnavailable.
        """
        if kernel not in self._prepared:
            self._prepared[kernel] = prepare_experts(
                copy_weights(self.weights),
                family=self.workload.family,
                swiglu=self.workload.swiglu,
                kernel=kernel,
                activations=activations_of(kernel),
            )
        return self._prepared[kernel]


def activations_of(kernel: str) -> str:
    """With which activations a kernel of ours is measured: BF16 ones, or those it has."""
    return next(name for name in ACTIVATIONS if name in kernels()[kernel].activations)


class Baseline(NamedTuple):
    """A framework's own kernel. activations: "bf16", or "fp8" where it rounds them to 8 bits: other
    numerics.
    """

    build: Callable[[Layer], Bind]
    activations: str = "bf16"


@dataclass(frozen=True)
class Contender:
    """activations: see `Baseline`. slow: binding can take a minute at one point, so it is measured
    last.
    """

    name: str
    ours: bool
    build: Callable[[Layer], Bind]
    slow: bool = False
    activations: str = "bf16"


def contenders(device: torch.device, deterministic: bool = False) -> list[Contender]:
    """Everyone there is, ours first. deterministic: with our kernels' deterministic and
    batch-invariant modes too.
    """
    modes: dict[str, dict[str, bool]] = {"": {}}
    if deterministic:
        modes |= {
            "-deterministic": {"deterministic": True},
            "-batch-invariant": {"deterministic": True, "batch_invariant": True},
        }
    shape = LayerShape(32, 2880, 2880)
    found = []
    for kernel in kernels().values():
        # The reference is no contender where there is a faster kernel.
        if device.type in kernel.auto_devices or (
            kernel.name != "reference" and kernel.unsupported_reason(shape, device) is None
        ):
            for suffix, mode in modes.items():
                found.append(
                    Contender(
                        f"ours-{kernel.name}{suffix}",
                        True,
                        partial(_ours, kernel.name, mode),
                        activations=activations_of(kernel.name),
                    )
                )
    found += [
        Contender(name, False, build, slow=name == AUTOTUNED) for name, build in STOCK.items()
    ]
    for adapter in adapters().values():
        if adapter.baselines:
            try:
                baselines = importlib.import_module(adapter.baselines).BASELINES
            except ImportError as error:  # the adapter itself is not there
                baselines = {f"{adapter.framework}-*": Baseline(partial(_raise, error))}
            found += [
                Contender(name, False, baseline.build, activations=baseline.activations)
                for name, baseline in baselines.items()
            ]
    return found


def _raise(error: Exception, layer: Layer) -> Bind:
    raise error


def _ours(kernel: str, mode: dict[str, bool], layer: Layer) -> Bind:
    fresh: dict[str, Any] = {"plans": {}, "launch_plans": {}}
    p = replace(layer.prepared(kernel), **mode | fresh)

    def bind(call: Batch) -> Timed:
        return partial(fused_moe, call.x, call.ids, call.weights, p, out=torch.empty_like(call.x))

    return bind


def _stock(profile_ids: list[int] | None, layer: Layer) -> Bind:
    """FlashInfer's public function, as a framework calls it: input padded and output trimmed around
    it, no workspace.
    """
    if layer.device.type != "cuda":
        raise KernelUnavailable("FlashInfer needs a Hopper GPU")
    p = layer.prepared("flashinfer")
    hidden, padding = layer.workload.hidden, p.w2.shape[1] - layer.workload.hidden
    run_moe, constants = compat.flashinfer_moe().cutlass_fused_moe, stock_arguments(p)

    def bind(call: Batch) -> Timed:
        def run() -> torch.Tensor:
            x = torch.nn.functional.pad(call.x, (0, padding)) if padding else call.x
            out = run_moe(
                input=x,
                token_selected_experts=call.ids,
                token_final_scales=call.weights,
                profile_ids=profile_ids,
                **constants,
            )
            out = out[0] if isinstance(out, list | tuple) else out
            return out[:, :hidden].contiguous() if padding else out

        return run if profile_ids else _autotuned(run, len(call.x))

    return bind


def _autotuned(run: Callable[[], torch.Tensor], tokens: int) -> Timed:
    """The call with the tactics that FlashInfer's own autotuner finds for exactly this number of
    tokens.
    """
    from flashinfer.autotuner import autotune

    buckets: dict[str, Any] = {"tuning_buckets": (tokens,), "round_up": True}
    with autotune(True, **buckets):
        run()

    def tuned() -> torch.Tensor:
        with autotune(False, **buckets):  # the same buckets find the same entries
            return run()

    return tuned


AUTOTUNED = "flashinfer-autotuned"
STOCK: dict[str, Callable[[Layer], Bind]] = {
    AUTOTUNED: partial(_stock, None),
    "flashinfer-default": partial(_stock, [-1, -1]),
}
