"""One backend of `hopper-mxfp4 bench --engine vllm`: a real vLLM engine, timed from outside.

bench/engine.py says what a job is and what is answered.
"""

import json
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from hopper_mxfp4 import env
from hopper_mxfp4.bench.engine import DEFAULT, activations_of, sum_counts, time_engine
from hopper_mxfp4.bench.jobs import answer

from .demo import set_environment

WORKER = f"{__package__}.bench_worker"
RANDOM = "hopper_mxfp4_random"  # a format to load that has no files, which WORKER registers
# DeepSeek-V4 on Hopper: the kernels that vLLM compiles as they are first used, and few of them.
DEEPSEEK_V4_ENVIRONMENT = {
    "VLLM_DEEP_GEMM_WARMUP": "skip",
    "VLLM_BLOCKSCALE_FP8_GEMM_FLASHINFER": "0",
}


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Start the job's backend and time it."""
    set_environment_of(job)
    import torch
    import vllm

    start_engine = vllm.LLM  # vLLM imports its parts as they are asked for
    imported = time.time()
    llm = start_engine(**_options(job, torch.cuda.is_available()))
    ready = time.time()
    config = llm.llm_engine.vllm_config
    vocabulary = config.model_config.get_vocab_size()
    timed = time_engine(partial(_generate, llm), vocabulary, job)
    measured = {
        "engine": f"vLLM {vllm.__version__}",
        "methods": sum_counts(llm.collective_rpc("bench_methods")),
        "gpus": config.parallel_config.world_size,
        "import_s": round(imported - job["began"], 2),
        "ready_s": round(ready - imported, 2),
        "kv_cache_tokens": _kv_cache_tokens(config.cache_config),
    } | timed
    if job["moe_time"]:
        try:
            of_ranks = llm.collective_rpc("bench_moe_ms", args=(job["batches"],))
            measured["moe_ms"] = {
                batch: max(ms[batch] for ms in of_ranks) for batch in timed["decode_ms"]
            }
        except Exception as error:  # the rest is worth reporting without it
            measured["moe_failed"] = repr(error)
    return measured


def set_environment_of(job: dict[str, Any]) -> None:
    """What vLLM and this package read of it. Before vLLM's import."""
    set_environment()
    activations = activations_of(job["backend"])
    if activations is not None:
        os.environ[env.ACTIVATIONS.name] = activations
    if _is_deepseek_v4(job):
        os.environ |= DEEPSEEK_V4_ENVIRONMENT | os.environ
    if os.environ.get("FLASHINFER_DISABLE_JIT"):
        # FlashInfer's sum over ranks, vLLM's first choice, is compiled when it is first used.
        os.environ.setdefault("VLLM_ALLREDUCE_USE_FLASHINFER", "0")


def _is_deepseek_v4(job: dict[str, Any]) -> bool:
    config = json.loads((Path(job["model"]) / "config.json").read_text())
    return config.get("model_type") == "deepseek_v4"


def _kv_cache_tokens(cache: Any) -> int:
    """As vLLM itself counts them where it does: layers of several kinds share the blocks."""
    counted = getattr(cache, "kv_cache_size_tokens", None)
    return int(counted or int(cache.num_gpu_blocks or 0) * int(cache.block_size))


def _options(job: dict[str, Any], on_gpu: bool) -> dict[str, Any]:
    from .selection import NAME  # which imports vLLM

    most = max(job["batches"])
    options: dict[str, Any] = {
        "model": job["model"],
        "skip_tokenizer_init": True,
        "max_model_len": max(4096, 2 * job["prompt_tokens"]) if on_gpu else 1024,
        "max_num_seqs": max(most, 2),
        "max_num_batched_tokens": 8192 if on_gpu else 1024,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
        "worker_extension_cls": f"{WORKER}.Extension",
    }
    if job["random_weights"]:
        options["load_format"] = RANDOM
    if on_gpu:
        # Decode steps in CUDA graphs, of exactly the batches that are timed.
        options |= {
            "gpu_memory_utilization": 0.88,
            "compilation_config": {
                "mode": 0,
                "cudagraph_mode": "FULL_DECODE_ONLY",
                "cudagraph_capture_sizes": sorted(job["batches"]),
            },
            "kernel_config": {"enable_flashinfer_autotune": False},
        }
        if _is_deepseek_v4(job):
            options["kv_cache_dtype"] = "fp8"  # the only one that its attention has
            options["kernel_config"]["enable_jit_warmup"] = False
        else:
            # In every build of vLLM, and needs no download.
            options["attention_backend"] = "TRITON_ATTN"
    else:
        options["enforce_eager"] = True
    if activations_of(job["backend"]) is not None:
        options["quantization"] = NAME
    elif job["backend"] != DEFAULT:
        options["moe_backend"] = job["backend"]
    for name, value in job["options"].items():
        both = isinstance(value, dict) and isinstance(options.get(name), dict)
        options[name] = options[name] | value if both else value
    return options


def _generate(llm: Any, prompts: list[list[int]], tokens: int) -> None:
    import vllm

    sampling = vllm.SamplingParams(
        temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False
    )
    llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)


if __name__ == "__main__":
    answer(sys.argv[1], measure)
