"""Random layers on the GPU, and the hand-written sequences the tests compare with."""

import torch

from hopper_mxfp4 import DEEPSEEK_V4, GPT_OSS, ExpertWeights, SwiGLU, restore_weights

CUDA = torch.device("cuda", 0)
SWIGLU = {"gpt_oss": SwiGLU(1.702, 1.0, 7.0), "deepseek_v4": SwiGLU(1.0, 0.0, 10.0)}
FAMILY = {"gpt_oss": GPT_OSS, "deepseek_v4": DEEPSEEK_V4}


def random_layer(family: str, e: int, h: int, i: int, seed: int = 0) -> ExpertWeights:
    """A layer whose outputs are of order one for x of order one."""
    g = torch.Generator(CUDA).manual_seed(seed)

    def byte(low, high, *shape):
        return torch.randint(low, high, shape, generator=g, device=CUDA, dtype=torch.uint8)

    def bias(*shape):
        return (
            torch.randn(*shape, generator=g, device=CUDA).bfloat16()
            if FAMILY[family].bias
            else None
        )

    return ExpertWeights(
        w13=byte(0, 256, e, 2 * i, h // 2),
        w2=byte(0, 256, e, h, i // 2),
        w13_scale=byte(118, 122, e, 2 * i, h // 32),
        w2_scale=byte(118, 122, e, h, i // 32),
        w13_bias=bias(e, 2 * i),
        w2_bias=bias(e, h),
    )


def random_call(
    m: int, h: int, e: int, top_k: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, topk_ids (distinct in a row, int32), topk_weights (normalised)."""
    g = torch.Generator(CUDA).manual_seed(1000 + seed)
    x = torch.randn(m, h, generator=g, device=CUDA).bfloat16()
    weights, ids = torch.randn(m, e, generator=g, device=CUDA).topk(top_k)
    return x, ids.int(), weights.softmax(-1)


def heavy_tailed(x: torch.Tensor, seed: int) -> torch.Tensor:
    """x times factors of a log-normal distribution."""
    g = torch.Generator(CUDA).manual_seed(seed)
    return x * torch.exp(1.5 * torch.randn(x.shape, generator=g, device=CUDA)).bfloat16()


def relative_l2(y: torch.Tensor, reference: torch.Tensor) -> float:
    y, reference = y.double(), reference.double()  # squares of large values overflow float32
    return ((y - reference).norm() / reference.norm()).item()


def with_masked_ids(ids):
    """Masked ids here and there, a row of them, and a row that names one expert only."""
    ids = ids.clone()
    ids[::7, 0] = -1
    ids[5] = -1
    ids[9] = ids[9, 0]
    return ids


def spread_over_ranks(ids, e, g):
    """Global ids that a random map makes these, and that map: several ids for each of e experts,
    ids of other ranks, values that no rank would give, ids beyond the map.
    """
    others = torch.tensor([-1, -1, -5, e, 2**31 - 1, -(2**31)])
    values = torch.cat((torch.arange(e).repeat(3), others))
    order = torch.randperm(len(values), generator=g)
    expert_map = values[order].int().to(CUDA)
    masked = [-1, len(values), 2**31 - 1, *(order >= 3 * e).nonzero().flatten().tolist()]
    choices = torch.stack([(values[order] == expert).nonzero().flatten() for expert in range(e)])
    local = (ids >= 0) & (ids < e)
    which = torch.randint(3, ids.shape, generator=g).to(CUDA)
    none = torch.randint(len(masked), ids.shape, generator=g).to(CUDA)
    known = choices.to(CUDA)[ids.clamp(0, e - 1).long(), which]
    unknown = torch.tensor(masked, device=CUDA)[none]
    return torch.where(local, known, unknown).to(ids.dtype), expert_map


def restored_is(p, w) -> bool:
    found = restore_weights(p)
    return all(
        torch.equal(getattr(found, name).view(torch.uint8), t.contiguous().view(torch.uint8))
        for name, t in w.tensors().items()
    )


def up128(n: int) -> int:
    return (n + 127) // 128 * 128


def by_hand(w: ExpertWeights, family: str) -> dict[str, torch.Tensor]:
    """De-interleave or split, swap the halves, pad, and FlashInfer's helpers, one whole tensor at a
    time.
    """
    from flashinfer.fused_moe import (
        interleave_moe_scales_for_sm90_mixed_gemm,
        interleave_moe_weights_for_sm90_mixed_gemm,
    )

    e, i, half_h = w.w13.shape[0], w.w13.shape[1] // 2, w.w13.shape[2]
    h, hp, ip = 2 * half_h, up128(2 * half_h), up128(i)

    def halves(t, fill, columns):
        gate, up = (t[:, 0::2], t[:, 1::2]) if family == "gpt_oss" else (t[:, :i], t[:, i:])
        out = torch.full((e, 2 * ip, columns), fill, dtype=t.dtype, device=t.device)
        out[:, :i, : t.shape[2]] = up
        out[:, ip : ip + i, : t.shape[2]] = gate
        return out

    def padded(t, fill, columns):
        out = torch.full((e, hp, columns), fill, dtype=t.dtype, device=t.device)
        out[:, :h, : t.shape[2]] = t
        return out

    made = {
        "w13": interleave_moe_weights_for_sm90_mixed_gemm(halves(w.w13, 0, hp // 2), "fp4"),
        "w2": interleave_moe_weights_for_sm90_mixed_gemm(padded(w.w2, 0, ip // 2), "fp4"),
        "w13_scale": interleave_moe_scales_for_sm90_mixed_gemm(
            halves(w.w13_scale, 127, hp // 32), group_size=32
        ),
        "w2_scale": interleave_moe_scales_for_sm90_mixed_gemm(
            padded(w.w2_scale, 127, ip // 32), group_size=32
        ),
    }
    if w.w13_bias is not None:
        made["w13_bias"] = halves(w.w13_bias[..., None], 0, 1)[..., 0]
        made["w2_bias"] = padded(w.w2_bias[..., None], 0, 1)[..., 0]
    return made


def direct_call(
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    made: dict[str, torch.Tensor],
    swiglu: SwiGLU,
    tactics: tuple[int, int] | None,
) -> torch.Tensor:
    """FlashInfer's function on hand-made tensors with hand-made padding and trim, summing in a
    fixed order.
    """
    from flashinfer.fused_moe import cutlass_fused_moe

    m, h = x.shape
    hp, e = made["w2"].shape[1], made["w2"].shape[0]
    padded = torch.zeros(m, hp, dtype=x.dtype, device=x.device)
    padded[:, :h] = x

    def each(value):
        return (
            None if value is None else torch.full((e,), value, dtype=torch.float32, device=x.device)
        )

    out = cutlass_fused_moe(
        input=padded,
        token_selected_experts=ids,
        token_final_scales=weights,
        fc1_expert_weights=made["w13"],
        fc2_expert_weights=made["w2"],
        output_dtype=torch.bfloat16,
        quant_scales=[made["w13_scale"], made["w2_scale"]],
        fc1_expert_biases=made.get("w13_bias"),
        fc2_expert_biases=made.get("w2_bias"),
        swiglu_alpha=each(swiglu.alpha),
        swiglu_beta=each(swiglu.beta),
        swiglu_limit=each(swiglu.limit),
        use_w4_group_scaling=True,
        use_fused_finalize=False,
        profile_ids=None if tactics is None else list(tactics),
    )
    out = out[0] if isinstance(out, list | tuple) else out
    return out[:, :h].contiguous()
