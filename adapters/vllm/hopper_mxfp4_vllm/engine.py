"""One backend of `hopper-mxfp4 bench --engine vllm`: a real vLLM engine, timed from outside.

bench/engine.py says what a job is and what is answered.
"""

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from hopper_mxfp4.bench.engine import DEFAULT, OURS
from hopper_mxfp4.bench.jobs import answer

from .demo import set_environment
from .selection import NAME

RANDOM = "hopper_mxfp4_random"  # a format to load: no files, weights as `_fill` makes them
REPEATS = 3


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Start the job's backend and time it."""
    set_environment()
    began = time.perf_counter()
    import torch
    import vllm

    imported = time.perf_counter()
    _register_random_weights()
    llm = vllm.LLM(**_options(job, torch.cuda.is_available()))
    ready = time.perf_counter()
    cache = llm.llm_engine.vllm_config.cache_config
    run = _runner(llm, job["prompt_tokens"])
    short, long = job["decoded"]
    decode_ms = {}
    run(2, 64, 4, 0)
    for batch in job["batches"]:
        run(batch, 64, 4, 0)  # captures and compiles whatever this size needs
        steps = [
            (run(batch, 64, long, seed) - run(batch, 64, short, seed)) / (long - short)
            for seed in range(REPEATS)
        ]
        decode_ms[str(batch)] = round(statistics.median(steps) * 1e3, 4)
    prompts, length = job["prompts"], job["prompt_tokens"]
    run(prompts, length, 1, 0)
    prefill_s = statistics.median(run(prompts, length, 1, seed) for seed in range(REPEATS))
    return {
        "engine": f"vLLM {vllm.__version__}",
        "methods": _sum(llm.apply_model(_methods)),
        "import_s": round(imported - began, 2),
        "ready_s": round(ready - imported, 2),
        "kv_cache_tokens": int(cache.num_gpu_blocks or 0) * int(cache.block_size),
        "decode_ms": decode_ms,
        "prefill_tokens_s": round(prompts * length / prefill_s, 1),
    }


def _options(job: dict[str, Any], on_gpu: bool) -> dict[str, Any]:
    most = max(job["batches"])
    options: dict[str, Any] = {
        "model": job["model"],
        "skip_tokenizer_init": True,
        "max_model_len": max(4096, 2 * job["prompt_tokens"]) if on_gpu else 1024,
        "max_num_seqs": max(most, 2),
        "max_num_batched_tokens": 8192 if on_gpu else 1024,
        "enable_prefix_caching": False,
        "disable_log_stats": True,
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
            # In every build of vLLM, and needs no download.
            "attention_backend": "TRITON_ATTN",
        }
    else:
        options["enforce_eager"] = True
    if job["backend"] == OURS:
        options["quantization"] = NAME
    elif job["backend"] != DEFAULT:
        options["moe_backend"] = job["backend"]
    return options


def _runner(llm: Any, longest: int) -> Callable[[int, int, int, int], float]:
    """run(requests, prompt tokens, tokens, seed): seconds that generating takes."""
    import torch
    import vllm

    vocabulary = llm.llm_engine.vllm_config.model_config.get_vocab_size()

    def run(requests: int, prompt: int, tokens: int, seed: int) -> float:
        g = torch.Generator().manual_seed(seed)
        ids = torch.randint(3, vocabulary - 1, (requests, prompt), generator=g).tolist()
        sampling = vllm.SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False
        )
        began = time.perf_counter()
        llm.generate([{"prompt_token_ids": row} for row in ids], sampling, use_tqdm=False)
        return time.perf_counter() - began

    return run


def _register_random_weights() -> None:
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

    @register_model_loader(RANDOM)
    class RandomModelLoader(DummyModelLoader):
        """vLLM's own dummy weights send every token to the same experts."""

        def load_weights(self, model: Any, *args: Any, **kwargs: Any) -> None:
            _fill(model)


def _fill(model: Any) -> None:
    """Weights that keep activations of order one and route evenly; random bits for the experts."""
    import torch

    device = next(model.parameters()).device
    g = torch.Generator(device).manual_seed(1)
    for name, parameter in model.named_parameters():
        t = parameter.data
        if t.dtype == torch.uint8:
            low, high = (118, 122) if "scale" in name else (0, 256)
            t.random_(low, high, generator=g)
        elif "norm" in name:
            t.fill_(1)
        elif t.is_floating_point():
            t.normal_(0, 1.0 if "embed" in name else 0.02, generator=g)


def _methods(model: Any) -> dict[str, int]:
    """What serves the MoE layers, by how many."""
    from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase

    found: dict[str, int] = {}
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if not isinstance(method, FusedMoEMethodBase):
            continue
        kernel = getattr(method, "kernel", None)
        served = getattr(kernel, "name", None) or getattr(method, "mxfp4_backend", None)
        name = f"{type(method).__name__} {served}"
        found[name] = found.get(name, 0) + 1
    return found


def _sum(of_ranks: list[dict[str, int]]) -> dict[str, int]:
    found: dict[str, int] = {}
    for methods in of_ranks:
        for name, count in methods.items():
            found[name] = found.get(name, 0) + count
    return found


if __name__ == "__main__":
    answer(sys.argv[1], measure)
