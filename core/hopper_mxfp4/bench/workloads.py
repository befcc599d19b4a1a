"""The layers that are measured, and the calls they are measured with."""

import math
import re
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from hopper_mxfp4 import (
    DEEPSEEK_V4,
    GPT_OSS,
    CheckpointFamily,
    ExpertWeights,
    PreparedExperts,
    SwiGLU,
    prepare_experts,
)
from hopper_mxfp4.checkpoint.weights import round_up
from hopper_mxfp4.contract import BLOCK, LayerShape


@dataclass(frozen=True)
class Workload:
    """One rank's expert layer of a model. tp: of how many tensor-parallel ranks; intermediate is
    the largest rank's shard.
    """

    name: str
    family: CheckpointFamily
    swiglu: SwiGLU
    experts: int
    top_k: int
    hidden: int
    intermediate: int
    tp: int = 1

    @property
    def shape(self) -> LayerShape:
        return LayerShape(self.experts, self.hidden, self.intermediate)

    @property
    def expert_bytes(self) -> float:
        """What a kernel must read of one expert: e2m1 weights, E8M0 scales, bf16 biases,
        unpadded.
        """
        weights = 3 * self.hidden * self.intermediate
        biases = 2 * (2 * self.intermediate + self.hidden) if self.family.bias else 0
        return weights / 2 + weights / BLOCK + biases

    def token_flops(self) -> float:
        """Multiplications and additions of one token's three products in each of its experts."""
        return self.top_k * 2.0 * 3 * self.hidden * self.intermediate


_GPT_OSS_SWIGLU = GPT_OSS.swiglu({})
# openai/gpt-oss-20b and -120b config.json; DeepSeek-V4-Flash's routed experts (SGLang's SM90
# benchmark, its pull request 24816).
_WHOLE = (
    Workload("gpt-oss-20b", GPT_OSS, _GPT_OSS_SWIGLU, 32, 4, 2880, 2880),
    Workload("gpt-oss-120b", GPT_OSS, _GPT_OSS_SWIGLU, 128, 4, 2880, 2880),
    Workload("dsv4-flash", DEEPSEEK_V4, SwiGLU(limit=10.0), 256, 6, 4096, 2048),
)
DEFAULT_WORKLOADS = tuple(workload.name for workload in _WHOLE)


def _shard(workload: Workload, tp: int) -> Workload:
    return replace(
        workload,
        name=f"{workload.name}-tp{tp}",
        intermediate=round_up(-(-workload.intermediate // tp), BLOCK),
        tp=tp,
    )


WORKLOADS = {
    workload.name: workload
    for whole in _WHOLE
    for workload in (whole, *(_shard(whole, tp) for tp in (2, 4, 8)))
}


def without_bias(workload: Workload) -> Workload:
    """The same layer with no biases, for those that have some."""
    return replace(
        workload, name=workload.name + "-nobias", family=replace(workload.family, bias=False)
    )


def parse_workload(text: str) -> Workload:
    """A workload by name, or "experts,hidden,intermediate,top_k[,bias]" of any layer. Raises
    ValueError naming what there is.
    """
    name = text.removesuffix("-nobias")
    if name in WORKLOADS:
        workload = WORKLOADS[name]
        return workload if name == text or not workload.family.bias else without_bias(workload)
    if re.fullmatch(r"\d+,\d+,\d+,\d+(,bias)?", text):
        experts, hidden, intermediate, top_k = map(int, text.split(",")[:4])
        family, swiglu = (
            (GPT_OSS, _GPT_OSS_SWIGLU)
            if text.endswith("bias")
            else (DEEPSEEK_V4, SwiGLU(limit=10.0))
        )
        if (
            0 < top_k <= experts
            and hidden
            and intermediate
            and not hidden % BLOCK
            and not intermediate % BLOCK
        ):
            return Workload(text, family, swiglu, experts, top_k, hidden, intermediate)
    raise ValueError(
        f"no workload is called {text!r}; there are {', '.join(WORKLOADS)}, each also with "
        "-nobias, "
        f"or give EXPERTS,HIDDEN,INTERMEDIATE,TOP_K[,bias] with sizes that are multiples of {BLOCK}"
    )


def random_weights(workload: Workload, device: torch.device, seed: int = 0) -> ExpertWeights:
    """Random weights as the family's checkpoints hold them, for outputs of order one from inputs of
    order one.
    """
    g = torch.Generator(device).manual_seed(seed)
    e, h, i = workload.experts, workload.hidden, workload.intermediate

    def byte(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=g, device=device, dtype=torch.uint8)

    def bias(*shape: int) -> torch.Tensor | None:
        return (
            torch.randn(shape, generator=g, device=device).bfloat16()
            if workload.family.bias
            else None
        )

    return ExpertWeights(
        w13=byte(0, 256, e, 2 * i, h // 2),
        w2=byte(0, 256, e, h, i // 2),
        w13_scale=byte(118, 122, e, 2 * i, h // BLOCK),
        w2_scale=byte(118, 122, e, h, i // BLOCK),
        w13_bias=bias(e, 2 * i),
        w2_bias=bias(e, h),
    )


def copy_weights(w: ExpertWeights) -> ExpertWeights:
    """The same tensors (whole ones, as `random_weights` makes them) in memory of their own."""
    tensors: dict[str, Any] = {name: t.clone() for name, t in w.tensors().items()}
    return ExpertWeights(**tensors)


def prepare_copies(
    workload: Workload, device: torch.device, copies: int, kernel: str = "auto"
) -> list[PreparedExperts]:
    """The prepared layer, as often as a rotation needs it, each in memory of its own."""
    return [
        prepare_experts(
            random_weights(workload, device),
            family=workload.family,
            swiglu=workload.swiglu,
            kernel=kernel,
        )
        for _ in range(max(copies, 1))
    ]


class Batch(NamedTuple):
    """One layer call: x [M, H] bf16, ids [M, K] int32, weights [M, K] float32, and the router's
    logits [M, E] bf16 they come from.
    """

    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    logits: torch.Tensor


ROUTINGS = ("uniform", "skewed")


def make_batch(
    workload: Workload, tokens: int, routing: str, device: torch.device, seed: int
) -> Batch:
    """Random activations and routing.

    uniform: every expert is as likely. skewed: the n-th most popular expert is chosen in proportion
    to 1/n. A row's logits are all different in bf16, so that kernels that route themselves choose
    the same experts.
    """
    g = torch.Generator(device).manual_seed(seed)
    x = torch.randn(tokens, workload.hidden, generator=g, device=device).bfloat16()
    score = -torch.log(
        -torch.log(
            torch.rand(tokens, workload.experts, generator=g, device=device).clamp(1e-9, 1 - 1e-7)
        )
    )  # Gumbel noise
    if routing == "skewed":
        # The order of popularity is the same in every call of a rotation: it is the model's.
        order = torch.randperm(workload.experts, generator=torch.Generator().manual_seed(1)).to(
            device
        )
        score -= torch.log(order + 1.0)
    elif routing != "uniform":
        raise ValueError(f"routing is {routing!r}; give one of {', '.join(ROUTINGS)}")
    rank = score.argsort(dim=1).argsort(dim=1)
    logits = (
        (rank - workload.experts + 1) / 4
    ).bfloat16()  # exact up to 512 experts, the best at 0
    best, ids = logits.float().topk(workload.top_k, dim=1)
    return Batch(x, ids.int(), best.softmax(dim=1).contiguous(), logits)


def active_experts(call: Batch) -> int:
    return len(torch.unique(call.ids))


def rotation(
    workload: Workload, tokens: int, routing: str, device: torch.device, l2_bytes: int
) -> list[Batch]:
    """The calls to run in turn, over `copies_needed` copies of the weights.

    Enough that what a call reads has left the L2 cache since it was last read, as between the
    layers of a model.
    """
    count = 8 if tokens <= 64 else 4 if tokens <= 512 else 2
    needed = 3 * l2_bytes
    per_call = min(workload.experts, tokens * workload.top_k) * workload.expert_bytes
    count = min(max(count, math.ceil(needed / per_call)), 32)
    return [make_batch(workload, tokens, routing, device, seed) for seed in range(count)]


def copies_needed(workload: Workload, l2_bytes: int) -> int:
    """How many copies of a layer's weights a rotation needs, so that the small shards' do not stay
    in the L2 cache.
    """
    return max(1, math.ceil(3 * l2_bytes / (workload.experts * workload.expert_bytes)))
