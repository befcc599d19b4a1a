#!/usr/bin/env python3
"""One step of run.sh:  engine.py warm PART | MODE OUT.json | compare A.json B.json

warm compiles one of the parts that vLLM compiles on its first use, and compares what it computes
with float32. run.sh warms all parts side by side.
"""

import json
import os
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "shared"))
from tokens import PROMPTS, compare_results, logits_beside
from vllm_engine import generate, prompt_logits

MODEL = os.environ.get("DSV4_MODEL", "/tmp/dsv4/checkpoint")
# Tokens a step. Up to 64 each GEMM has one kernel, so that there is little to compile.
BATCH = int(os.environ.get("DSV4_BATCH", "64"))
H, HC, MIX = 4096, 4, 24
LINEARS = {
    "wqa_wkv": (1536, 4096),
    "wq_b": (32768, 1024),
    "wo_b": (4096, 8192),
    "shared_up": (4096, 4096),
    "shared_down": (4096, 2048),
}
ENGINE = {
    "skip_tokenizer_init": True,
    "max_model_len": 1024,
    "max_num_seqs": 8,
    "max_num_batched_tokens": BATCH,
    "enable_prefix_caching": False,
    "disable_log_stats": True,
    "enforce_eager": True,
    "gpu_memory_utilization": 0.2,
    "kv_cache_memory_bytes": 1 << 30,
    "kv_cache_dtype": "fp8",
}
NO_AUTOTUNE = {"kernel_config": {"enable_flashinfer_autotune": False}}
MODES = {
    "marlin": {"moe_backend": "marlin"},
    "humming": {"moe_backend": "humming"},
    "flashinfer_cutlass": {"moe_backend": "flashinfer_cutlass", **NO_AUTOTUNE},
    "ours": {"quantization": "hopper_mxfp4", **NO_AUTOTUNE},
}


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

        n, k = LINEARS[part]
        w = torch.randn(n, k, device="cuda").clamp(-3, 3).to(torch.float8_e4m3fn)
        ws = torch.full((n // 128, k // 128), 2.0**-5, device="cuda")
        for m in sorted({4, 8, BATCH}):
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            q, s = per_token_group_quant_fp8(
                x, 128, column_major_scales=True, tma_aligned_scales=True, use_ue8m0=True
            )
            out = torch.empty(m, n, device="cuda", dtype=torch.bfloat16)
            fp8_gemm_nt((q, s), (w, ws), out, is_deep_gemm_e8m0_used=True)
            want = x.float() @ (w.float() * 2.0**-5).t()
            yield f"m={m} relative error {((out.float() - want).norm() / want.norm()).item():.3f}"
    elif part == "wo_a":
        from vllm.models.deepseek_v4.common.ops.fused_inv_rope_fp8_quant import (
            fused_inv_rope_fp8_quant,
        )
        from vllm.utils.deep_gemm import fp8_einsum

        w = torch.randn(8, 1024, 4096, device="cuda").clamp(-3, 3).to(torch.float8_e4m3fn)
        ws = torch.full((8, 8, 32), 2.0**-5, device="cuda")
        for m in sorted({4, BATCH}):
            o = torch.randn(m, 64, 512, device="cuda", dtype=torch.bfloat16)
            cos_sin = torch.cat([torch.ones(128, 32), torch.zeros(128, 32)], 1).cuda()
            q, s = fused_inv_rope_fp8_quant(
                o, torch.arange(m, device="cuda"), cos_sin, n_groups=8, heads_per_group=8
            )
            z = torch.empty(m, 8, 1024, device="cuda", dtype=torch.bfloat16)
            fp8_einsum("bhr,hdr->bhd", (q, s), (w, ws), z, recipe=(1, 128, 128))
            want = torch.einsum("bhr,hdr->bhd", o.view(m, 8, 4096).float(), w.float() * 2.0**-5)
            yield f"m={m} relative error {((z.float() - want).norm() / want.norm()).item():.3f}"
    elif part.startswith("mhc"):
        from vllm.model_executor.kernels.mhc import tilelang as mhc
        from vllm.model_executor.kernels.mhc.torch import mhc_post_torch, mhc_pre_torch

        rand, fn, scale, base, common, norm = mhc_inputs(0)
        bf = torch.bfloat16
        if part == "mhc_first":
            broadcast = fn.view(-1, HC, H).sum(1)
            for t in sorted({4, BATCH}):
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
            for t in {"mhc_4": [4], "mhc_20": [20], "mhc_batch": [BATCH]}[part]:
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


def describe(model):
    """Methods and kernels of the model's experts and linears."""
    found = {}
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if method is None:
            continue
        kernel = (
            getattr(method, "kernel", None)
            or getattr(method, "mxfp4_backend", None)
            or getattr(method, "fp8_linear", None)
        )
        name = f"{type(method).__name__} {getattr(kernel, 'name', None) or type(kernel).__name__}"
        found[name] = found.get(name, 0) + 1
    return found


def engine(mode, out):
    began = time.time()
    import torch
    from vllm import LLM

    from hopper_mxfp4.cli.demo import CALLS, count_calls

    if mode == "ours":
        count_calls()

    llm = LLM(model=MODEL, **ENGINE | MODES[mode])
    result = {
        "mode": mode,
        "ready_s": round(time.time() - began, 1),
        "layers": llm.apply_model(describe),
    }
    print("DSV4 ready", json.dumps(result), flush=True)
    result["answers"] = []
    for group in (PROMPTS[:1], PROMPTS):  # one alone, then all at once
        result["answers"] += generate(llm, group)
        out.write_text(json.dumps(result))
        print("DSV4 tokens", [answer["tokens"] for answer in result["answers"]], flush=True)
    try:
        torch.save(prompt_logits(llm), logits_beside(out))
    except Exception:  # the tokens are worth reporting without them
        traceback.print_exc()
    result["kernel_calls"] = dict(CALLS)
    result["all_s"] = round(time.time() - began, 1)
    out.write_text(json.dumps(result))
    shown = {key: value for key, value in result.items() if key != "answers"}
    print("DSV4 done", json.dumps(shown), flush=True)


def compare(first: Path, other: Path) -> None:
    found = compare_results(first, other)
    print("DSV4 COMPARE", first.stem, other.stem, json.dumps(found))


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
    what = sys.argv[1]
    if what == "warm":
        try_part(sys.argv[2])
    elif what == "compare":
        compare(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        engine(what, Path(sys.argv[2]))
