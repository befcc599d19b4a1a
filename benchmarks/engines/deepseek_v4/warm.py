#!/usr/bin/env python3
"""One step of prepare.sh:  warm.py PART

Compiles one of the parts that vLLM compiles on its first use, and compares what it computes with
float32. prepare.sh warms all parts side by side, for the numbers of tokens in DSV4_TOKENS and of
tensor-parallel ranks in DSV4_TP.
"""

import os
import sys
import time
import traceback
from itertools import product

TOKENS = [int(tokens) for tokens in os.environ.get("DSV4_TOKENS", "4 8 20 64").split()]
RANKS = [int(ranks) for ranks in os.environ.get("DSV4_TP", "1").split()]
H, HC, MIX = 4096, 4, 24
LINEARS = {
    "wqa_wkv": (1536, 4096),
    "wq_b": (32768, 1024),
    "wo_b": (4096, 8192),
    "shared_up": (4096, 4096),
    "shared_down": (4096, 2048),
}
# Which side of a weight tensor parallelism splits.
SPLIT = {"wq_b": 0, "wo_b": 1, "shared_up": 0, "shared_down": 1}


def shapes(part):
    """A linear layer's on a rank, for each number of ranks."""
    for ranks in RANKS if part in SPLIT else [1]:
        sizes = list(LINEARS[part])
        if part in SPLIT:
            sizes[SPLIT[part]] //= ranks
        yield tuple(sizes)


def mhc_inputs(t):
    import torch

    g = torch.Generator("cuda").manual_seed(0)

    def rand(*shape, dtype=torch.float32):
        return torch.randn(*shape, generator=g, device="cuda").to(dtype)

    fn, scale, base = rand(MIX, HC * H) / 128, torch.full((3,), 0.3, device="cuda"), rand(MIX)
    common = (1e-6, 1e-6, 1e-6, 2.0, 20)
    norm = {"norm_weight": torch.ones(H, device="cuda", dtype=torch.bfloat16), "norm_eps": 1e-6}
    return rand, fn, scale, base, common, norm


def warm(part):
    import torch

    torch.cuda.set_device(0)
    if part in LINEARS:
        from vllm.model_executor.layers.quantization.utils.fp8_utils import (
            per_token_group_quant_fp8,
        )
        from vllm.utils.deep_gemm import fp8_gemm_nt

        for (n, k), m in product(shapes(part), TOKENS):
            w = torch.randn(n, k, device="cuda").clamp(-3, 3).to(torch.float8_e4m3fn)
            ws = torch.full((n // 128, k // 128), 2.0**-5, device="cuda")
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            q, s = per_token_group_quant_fp8(
                x, 128, column_major_scales=True, tma_aligned_scales=True, use_ue8m0=True
            )
            out = torch.empty(m, n, device="cuda", dtype=torch.bfloat16)
            fp8_gemm_nt((q, s), (w, ws), out, is_deep_gemm_e8m0_used=True)
            want = x.float() @ (w.float() * 2.0**-5).t()
            error = (out.float() - want).norm() / want.norm()
            yield f"{n}x{k} m={m} relative error {error.item():.3f}"
    elif part == "wo_a":
        from vllm.models.deepseek_v4.common.ops.fused_inv_rope_fp8_quant import (
            fused_inv_rope_fp8_quant,
        )
        from vllm.utils.deep_gemm import fp8_einsum

        for ranks, m in product(RANKS, TOKENS):
            g = 8 // ranks
            w = torch.randn(g, 1024, 4096, device="cuda").clamp(-3, 3).to(torch.float8_e4m3fn)
            ws = torch.full((g, 8, 32), 2.0**-5, device="cuda")
            o = torch.randn(m, 64 // ranks, 512, device="cuda", dtype=torch.bfloat16)
            cos_sin = torch.cat([torch.ones(128, 32), torch.zeros(128, 32)], 1).cuda()
            q, s = fused_inv_rope_fp8_quant(
                o, torch.arange(m, device="cuda"), cos_sin, n_groups=g, heads_per_group=8
            )
            z = torch.empty(m, g, 1024, device="cuda", dtype=torch.bfloat16)
            fp8_einsum("bhr,hdr->bhd", (q, s), (w, ws), z, recipe=(1, 128, 128))
            want = torch.einsum("bhr,hdr->bhd", o.view(m, g, 4096).float(), w.float() * 2.0**-5)
            error = (z.float() - want).norm() / want.norm()
            yield f"{g} groups m={m} relative error {error.item():.3f}"
    elif part.startswith("mhc"):
        from vllm.model_executor.kernels.mhc import tilelang as mhc
        from vllm.model_executor.kernels.mhc.torch import mhc_post_torch, mhc_pre_torch

        rand, fn, scale, base, common, norm = mhc_inputs(0)
        bf = torch.bfloat16
        if part == "mhc_first":
            broadcast = fn.view(-1, HC, H).sum(1)
            for t in TOKENS:
                out = mhc.mhc_pre_broadcast_tilelang(
                    rand(t, H, dtype=bf), fn, scale, base, *common, fn_broadcast=broadcast, **norm
                )
                yield f"m={t} finite {[x.isfinite().all().item() for x in out]}"
        elif part == "mhc_head":
            x, res = rand(4, H, dtype=bf), rand(4, HC, H, dtype=bf)
            post, comb = rand(4, HC, 1).sigmoid(), rand(4, HC, HC).softmax(-1)
            out = mhc.mhc_post_tilelang(x, res, post, comb)
            want = mhc_post_torch(x, res, post, comb)
            yield f"post error {(out.float() - want.float()).abs().max().item():.3f}"
            out = mhc.hc_head_fused_kernel_tilelang(
                res, rand(HC, HC * H) / 128, scale[:1], base[:HC], 1e-6, 1e-6
            )
            yield f"head finite {out.isfinite().all().item()}"
        else:
            t = int(part.removeprefix("mhc_"))
            x, res = rand(t, H, dtype=bf), rand(t, HC, H, dtype=bf)
            post, comb = rand(t, HC, 1).sigmoid(), rand(t, HC, HC).softmax(-1)
            out = mhc.mhc_fused_post_pre_tilelang(
                x, res, post, comb, fn, scale, base, *common, **norm
            )
            want = mhc_pre_torch(out[0], fn, scale, base, *common)
            yield f"m={t} post-mix error {(out[1] - want[0]).abs().max().item():.4f}"
    elif part == "flashmla":
        from vllm.v1.attention.ops.flashmla import (
            flash_mla_sparse_fwd,
            is_flashmla_sparse_supported,
        )

        yield f"supported {is_flashmla_sparse_supported()}"
        q, kv = (
            torch.randn(*s, device="cuda", dtype=torch.bfloat16)
            for s in ((8, 64, 512), (256, 1, 512))
        )
        indices = torch.arange(128, device="cuda", dtype=torch.int32).expand(8, 1, 128).contiguous()
        lens = torch.full((8,), 128, device="cuda", dtype=torch.int32)
        out = torch.empty_like(q)
        flash_mla_sparse_fwd(
            q=q,
            kv=kv,
            indices=indices,
            sm_scale=512**-0.5,
            attn_sink=torch.full((64,), -1e30, device="cuda"),
            topk_length=lens,
            out=out,
        )
        want = ((q.float() @ kv[:128, 0].float().t()) * 512**-0.5).softmax(-1) @ kv[:128, 0].float()
        error = (out.float() - want).norm() / want.norm()
        yield f"sparse prefill relative error {error.item():.4f}"
    torch.cuda.synchronize()


def try_part(part: str) -> None:
    began, said = time.time(), []
    try:
        for line in warm(part):
            said.append(line)
        print(f"WARM {part} ok {time.time() - began:.0f} s: {'; '.join(said)}", flush=True)
    except Exception as e:
        traceback.print_exc()
        error = f"{type(e).__name__} {str(e)[-600:]}"
        print(
            f"WARM {part} FAILED {time.time() - began:.0f} s after {said}: {error}",
            flush=True,
        )


if __name__ == "__main__":
    try_part(sys.argv[1])
