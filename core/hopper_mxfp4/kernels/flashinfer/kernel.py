"""The `flashinfer` kernel: FlashInfer's CUTLASS grouped GEMMs for BF16 x MXFP4 on SM90."""

import logging
import os
from bisect import bisect_left
from collections.abc import Callable
from functools import cache, lru_cache, partial
from typing import Any, NamedTuple

import torch

from hopper_mxfp4 import env
from hopper_mxfp4.checkpoint.weights import round_up
from hopper_mxfp4.contract import (
    BLOCK,
    WORKSPACE_ALIGNMENT,
    Call,
    Compilation,
    KernelUnavailable,
    LayerShape,
    Layout,
    PreparedExperts,
    Run,
)
from hopper_mxfp4.kernels.flashinfer import compat, staging
from hopper_mxfp4.kernels.flashinfer.direct import (
    Direct,
    NotRecorded,
    fitting_tactics,
    record,
    tactic_counts,
    valid_tactics,
)
from hopper_mxfp4.kernels.flashinfer.layout import UNPACK_SM90_SCALE, unpack_sm90_weight
from hopper_mxfp4.kernels.flashinfer.staging import Stage, Staged, staged
from hopper_mxfp4.kernels.support import bounded_put, cached, log_once
from hopper_mxfp4.scratch import device_guard
from hopper_mxfp4.tuning.cards import Card, card_of
from hopper_mxfp4.tuning.tables import DEFAULT, UNKNOWN, Build, Pair, TunedShape, choose, schedule

logger = logging.getLogger(__name__)

# A scale block of the kernel covers 128 values of K; hidden and intermediate size are each the K
# of one GEMM.
MULTIPLE = 128


class FlashInferKernel:
    """Calls `flashinfer.fused_moe.cutlass_fused_moe(use_w4_group_scaling=True)` with local experts
    and whole shards.
    """

    name = "flashinfer"
    auto_devices = frozenset({"cuda"})
    activations = frozenset({"bf16"})

    def unsupported_reason(
        self, shape: LayerShape, device: torch.device, deterministic: bool = False
    ) -> str | None:
        if device.type != "cuda":
            return f"it needs a Hopper GPU, and the weights are on {device}; move them to cuda"
        if torch.version.hip:
            return "it needs an NVIDIA Hopper GPU, and this torch is built for ROCm"
        capability = torch.cuda.get_device_capability(device)
        if capability != (9, 0):
            name, (major, minor) = torch.cuda.get_device_name(device), capability
            return f"it needs compute capability 9.0 (Hopper), and {name} has {major}.{minor}"
        return (
            compat.flashinfer_problem()
            or _import_problem()
            or (_determinism_problem() if deterministic else None)
        )

    def layout(self, device: torch.device) -> Layout:
        return _layout(
            torch.device(
                "cuda", torch.cuda.current_device() if device.index is None else device.index
            )
        )

    def compilations(self, shape: LayerShape) -> list[Compilation]:
        """What stages its inputs. Without NVRTC that fails, and torch stages them."""
        return [Compilation(staging.compile_kernel)]

    def warm_up(self, p: PreparedExperts) -> None:
        staging.stager(p.w13.device)

    def workspace_bytes(self, p: PreparedExperts, num_tokens: int, top_k: int) -> int:
        h, i = p.w2.shape[1], p.w13.shape[1] // 2
        staged = 2 * _rows_bytes(num_tokens, h) + 2 * _routing_bytes(num_tokens, top_k)
        return staged + _flashinfer_bytes(
            num_tokens, h, i, p.shape.num_experts, top_k, not p.deterministic, p.w13.device
        )

    def make_runner(self, p: PreparedExperts, num_tokens: int, top_k: int) -> Run:
        plan = cached(p, self.name, top_k, make_plan)
        return partial(
            run_pair, plan, plan.pairs[bisect_left(plan.edges, num_tokens)] if plan.pairs else None
        )


class TacticPlan(NamedTuple):
    """How one layer's calls of one top-k run.

    edges, pairs: tactics by number of tokens, see tactics.Schedule; no pairs: FlashInfer chooses.
    direct: FlashInfer's runner without its wrapper; None where this FlashInfer must be called
        through it.
    lacking: arguments that its wrapper does not take.
    stage: see staging.Stage.
    shape, build: what its tactics are kept under. card: what is known of this GPU's speed.
    """

    edges: list[float]
    pairs: list[Pair]
    direct: Direct | None
    lacking: frozenset[str]
    stage: Stage
    shape: TunedShape
    build: Build
    card: Card | None


def make_plan(p: PreparedExperts, top_k: int) -> TacticPlan:
    """Look up a layer's tactics and record its call: some tenths of a millisecond, once."""
    device, hidden, intermediate = p.w13.device, p.w2.shape[1], p.w13.shape[1] // 2
    one = {
        "output": torch.empty(1, hidden, dtype=torch.bfloat16, device=device),
        "input": torch.empty(1, hidden, dtype=torch.bfloat16, device=device),
        "token_selected_experts": torch.empty(1, top_k, dtype=torch.int32, device=device),
        "token_final_scales": torch.empty(1, top_k, dtype=torch.float32, device=device),
        "workspace_buffer": torch.empty(0, dtype=torch.uint8, device=device),
    }
    direct, counts, lacking, stage = None, UNKNOWN, compat.lacking(), staging.stager(device)
    try:
        direct = record(compat.flashinfer_moe(), stock_arguments(p) | one)
        counts = tactic_counts(direct.runner)
    except (NotRecorded, AttributeError) as error:
        log_once(
            logger,
            logging.WARNING,
            f"FlashInfer {compat.flashinfer_version()} is called through its own Python, which is "
            f"slower: {error}",
        )
    # Only a second GEMM that can sum a token's experts in its epilogue has more tactics than the
    # first.
    finalize = "fused" if counts[1] > counts[0] and not p.deterministic else "separate"
    shape = TunedShape(
        p.shape.num_experts, hidden, intermediate, top_k, p.w13_bias is not None, finalize
    )
    build, card = build_of(device, counts), card_on(device)
    table, where = choose(shape, build, card)
    if table is None:
        fixed = [(DEFAULT, DEFAULT)] if p.batch_invariant else []
        chooser = (
            "FlashInfer's default tactics, whatever the batch"
            if fixed
            else "what FlashInfer's own autotuner has cached, or its default"
        )
        log_once(
            logger,
            logging.INFO,
            f"MoE {shape} runs {chooser}: {where}; `hopper-mxfp4 tune` measures it",
        )
        return TacticPlan([], fixed, direct, lacking, stage, shape, build, card)
    log_once(logger, logging.INFO, f"MoE {shape} runs tactics {where}")
    edges, pairs = schedule(table, shape, _valid(direct, p), fixed=p.batch_invariant)
    return TacticPlan(edges, pairs, direct, lacking, stage, shape, build, card)


def run_pair(plan: TacticPlan, pair: Pair | None, call: Call, p: PreparedExperts) -> None:
    """A `Run`, given a plan and a pair of tactics (None: FlashInfer chooses)."""
    x, topk_ids, topk_weights, out, workspace, _ = call
    m, top_k = topk_ids.shape
    views = _views(workspace, m, p.shape.hidden_size, plan.shape.hidden, top_k)
    whole = views.out is None and x.is_contiguous()
    to = views.routing if whole else views.staged
    source, target = x if whole else views.staged.x, out if views.out is None else views.out
    plan.stage(x, topk_ids, topk_weights, p.shape.num_experts, to)
    if plan.direct is not None and pair is not None:
        plan.direct.call(target, source, to.ids, to.weights, views.scratch, pair)
    else:
        arguments = stock_arguments(p) | {
            "output": target,
            "input": source,
            "token_selected_experts": to.ids,
            "token_final_scales": to.weights,
            "workspace_buffer": views.scratch,
            "profile_ids": None if pair is None else list(pair),
        }
        compat.flashinfer_moe().cutlass_fused_moe(
            **{name: value for name, value in arguments.items() if name not in plan.lacking}
        )
    if views.trimmed is not None:
        out.copy_(views.trimmed)


def stock_arguments(p: PreparedExperts) -> dict[str, Any]:
    """The arguments of cutlass_fused_moe that are a layer's and not a call's."""
    return {
        "fc1_expert_weights": p.w13,
        "fc2_expert_weights": p.w2,
        "output_dtype": torch.bfloat16,
        "quant_scales": [p.w13_scale, p.w2_scale],
        "fc1_expert_biases": p.w13_bias,
        "fc2_expert_biases": p.w2_bias,
        "swiglu_alpha": p.alpha,
        "swiglu_beta": p.beta,
        "swiglu_limit": p.limit,
        # Local ids and this rank's shard: FlashInfer needs no word of the other ranks. A tp_rank
        # other than 0 would drop the second bias, which the loaders already zero there.
        "tp_size": 1,
        "tp_rank": 0,
        "ep_size": 1,
        "ep_rank": 0,
        "use_w4_group_scaling": True,
        "use_fused_finalize": not p.deterministic,
    }


class Views(NamedTuple):
    """Where things lie in a workspace.

    staged: what FlashInfer is handed; routing: the same without x. out: bf16 [M, Hp], trimmed: its
    true columns; both None where nothing is padded.
    """

    staged: Staged
    routing: Staged
    out: torch.Tensor | None
    trimmed: torch.Tensor | None
    scratch: torch.Tensor


_MAX_VIEWS = 1024  # batch sizes to remember before starting anew


def _views(workspace: torch.Tensor, m: int, hidden: int, padded: int, top_k: int) -> Views:
    """Remembered on the core's own workspace, whose tensor lives from call to call."""
    remembered = getattr(workspace, "views", None)
    key = (m, hidden, padded, top_k)
    found = None if remembered is None else remembered.get(key)
    if found is not None:
        return found
    rows, routing = _rows_bytes(m, padded), _routing_bytes(m, top_k)

    def at(start: int, dtype: torch.dtype, columns: int) -> torch.Tensor:
        return workspace[start : start + dtype.itemsize * m * columns].view(dtype).view(m, columns)

    out = None if padded == hidden else at(rows, torch.bfloat16, padded)
    ids, weights = at(2 * rows, torch.int32, top_k), at(2 * rows + routing, torch.float32, top_k)
    made = Views(
        staged=staged(at(0, torch.bfloat16, padded), ids, weights),
        routing=staged(None, ids, weights),
        out=out,
        trimmed=None if out is None else out[:, :hidden],
        scratch=workspace[2 * (rows + routing) :],
    )
    return made if remembered is None else bounded_put(remembered, key, made, _MAX_VIEWS)


def layer_tactics(plan: TacticPlan, p: PreparedExperts) -> tuple[list[int], list[int]]:
    """The tactics that can run at this layer's sizes, for each GEMM.

    Raises KernelUnavailable where FlashInfer can't be asked.
    """
    if plan.direct is None:
        raise KernelUnavailable(
            f"FlashInfer {plan.build.flashinfer} does not tell its tactics; {compat.INSTALL}"
        )
    first, second = _gemm_sizes(p)
    return valid_tactics(plan.direct.runner, 1, *first), valid_tactics(
        plan.direct.runner, 2, *second
    )


def _gemm_sizes(p: PreparedExperts) -> tuple[Pair, Pair]:
    hidden, rows = p.w2.shape[1], p.w13.shape[1]
    return (rows, hidden), (hidden, rows // 2)


def _valid(direct: Direct | None, p: PreparedExperts) -> Callable[[int, int], bool]:
    if direct is None:
        return lambda gemm, tactic: True  # a table of this very FlashInfer, for a similar shape
    fitting = [
        fitting_tactics(direct.runner, gemm, *sizes)
        for gemm, sizes in enumerate(_gemm_sizes(p), start=1)
    ]
    return lambda gemm, tactic: tactic in fitting[gemm - 1]


def _gpu_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def build_of(device: torch.device, counts: Pair = UNKNOWN) -> Build:
    """What tables on this device are kept under."""
    return Build(_gpu_name(device), str(compat.flashinfer_version()), _module_hash(), counts)


def card_on(device: torch.device) -> Card | None:
    if device.type != "cuda":
        return None
    return card_of(_gpu_name(device), torch.cuda.get_device_properties(device))


def _module_hash() -> str:
    try:
        return compat.module_hash()
    except (OSError, ImportError):
        return "none"


def _rows_bytes(num_tokens: int, hidden_size: int) -> int:
    return round_up(2 * num_tokens * hidden_size, WORKSPACE_ALIGNMENT)


def _routing_bytes(num_tokens: int, top_k: int) -> int:
    """Of the ids, and again of the weights."""
    return round_up(4 * num_tokens * top_k, WORKSPACE_ALIGNMENT)


@cache
def _import_problem() -> str | None:
    # FlashInfer's kernels trace every launch unless told otherwise; read once, when its module
    # loads.
    os.environ.setdefault("TLLM_LOG_LEVEL", "INFO")
    try:
        moe = compat.flashinfer_moe()
    except Exception as error:  # a broken install can raise anything, and any of it is the reason
        return (
            f"importing FlashInfer failed ({type(error).__name__}: {error}); {compat.INSTALL} anew"
        )
    names = (
        "cutlass_fused_moe",
        "interleave_moe_weights_for_sm90_mixed_gemm",
        "interleave_moe_scales_for_sm90_mixed_gemm",
    )
    missing = [name for name in names if not hasattr(moe, name)]
    if missing:
        return f"FlashInfer lacks {', '.join(missing)}; {compat.INSTALL}"
    if compat.scale_layout(moe.interleave_moe_scales_for_sm90_mixed_gemm) is None:
        return (
            f"FlashInfer {compat.flashinfer_version()} lays scales out in a way this release "
            f"does not know; {compat.INSTALL}"
        )
    return None


def _determinism_problem() -> str | None:
    lacking = compat.lacking()
    if not lacking:
        return None
    return (
        f"FlashInfer {compat.flashinfer_version()} takes no {', '.join(sorted(lacking))}, which "
        f"deterministic and batch-invariant calls need; {compat.INSTALL}"
    )


@cache
def _layout(device: torch.device) -> Layout:
    """The layout of the installed FlashInfer, checked against its own helpers on this device."""
    version = compat.flashinfer_version()
    if version is not None and compat.is_unsafe(version):  # or it would not have come here
        logger.warning(
            "FlashInfer %s sometimes gives wrong results on Hopper (its issue 5438) and runs "
            "because %s is set; %s",
            version,
            env.ALLOW_UNSAFE_FLASHINFER.name,
            compat.INSTALL,
        )
    if compat.compiled_module() is None:
        logger.warning(
            "FlashInfer has no compiled SM90 MoE module and builds one now, which can take an "
            "hour; flashinfer-jit-cache has it ready"
        )
    moe = compat.flashinfer_moe()
    scales = compat.scale_layout(moe.interleave_moe_scales_for_sm90_mixed_gemm)
    assert scales is not None  # unsupported_reason has seen to it
    layout = Layout(
        name=f"flashinfer-sm90-{scales}",
        multiple=MULTIPLE,
        pack_weight=lambda w: _there(w, moe.interleave_moe_weights_for_sm90_mixed_gemm, "fp4"),
        pack_scale=lambda s: _there(
            s, moe.interleave_moe_scales_for_sm90_mixed_gemm, group_size=BLOCK
        ),
        unpack_weight=unpack_sm90_weight,
        unpack_scale=UNPACK_SM90_SCALE[scales],
        # Its kernels take the byte for a float32's exponent field, where 0 means zero.
        least_scale=1,
    )
    probe = (
        torch.arange(2 * 64 * 64, device=device)
        .mul(40503)
        .bitwise_right_shift(7)
        .to(torch.uint8)
        .view(2, 64, 64)
    )
    if not torch.equal(layout.unpack_weight(layout.pack_weight(probe)), probe):
        raise KernelUnavailable(
            f"FlashInfer {version} lays weights out in a way this release does not know; "
            f"{compat.INSTALL}"
        )
    return layout


def _there(
    t: torch.Tensor, pack: Callable[..., torch.Tensor], *args: Any, **kwargs: Any
) -> torch.Tensor:
    """pack(t) with t's GPU as the current one, where FlashInfer launches.

    On another GPU the launch would not wait for the work that still writes t.
    """
    with device_guard(t.device):
        return pack(t, *args, **kwargs)


@lru_cache(maxsize=4096)
def _flashinfer_bytes(
    m: int, h: int, i: int, experts: int, top_k: int, fused: bool, device: torch.device
) -> int:
    if "workspace_buffer" in compat.lacking():  # it has torch allocate for each call
        return 0
    return compat.flashinfer_moe().cutlass_fused_moe_workspace_size(
        m,
        h,
        i,
        experts,
        top_k,
        x_dtype=torch.bfloat16,
        weight_dtype=torch.uint8,
        use_w4_group_scaling=True,
        use_fused_finalize=fused,
        device=device,
    )
