"""One backend of `hopper-mxfp4 bench --engine sglang`: a real SGLang engine, timed from outside.

bench/engine.py says what a job is and what is answered.
"""

import json
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from hopper_mxfp4 import env
from hopper_mxfp4.bench.engine import DEFAULT, activations_of, sum_counts, time_engine
from hopper_mxfp4.bench.jobs import answer


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Start the job's backend and time it."""
    set_environment(job["backend"])
    import sglang
    import torch
    from sglang.srt.entrypoints.engine import Engine

    from . import register
    from .bench_scheduler import run_scheduler

    if env.MODE.read() != "off":
        register()
    options = engine_options(job, torch.cuda.is_available())
    imported = time.time()
    with tempfile.TemporaryDirectory(prefix="hopper-mxfp4-schedulers-") as folder:

        class Watched(Engine):
            """SGLang's engine with schedulers that fill random weights and report."""

            run_scheduler_process_func = staticmethod(partial(run_scheduler, folder))

        engine = Watched(**options)
        ready = time.time()
        try:
            timed = time_engine(partial(_generate, engine), vocabulary_of(job["model"]), job)
        finally:
            engine.shutdown()
        reports = [json.loads(path.read_text()) for path in Path(folder).glob("*.json")]
    measured = {
        "engine": f"SGLang {sglang.__version__}",
        "methods": sum_counts([report["methods"] for report in reports]),
        "gpus": len(reports),
        "import_s": round(imported - job["began"], 2),
        "ready_s": round(ready - imported, 2),
        "kv_cache_tokens": _replicas(options) * min(r["kv_cache_tokens"] for r in reports),
    } | timed
    if job["moe_time"]:
        measured["moe_failed"] = "the MoE blocks' share is timed in vLLM's engine only"
    return measured


def set_environment(backend: str) -> None:
    """Of the processes that SGLang starts, too: this package on or off, whatever the shell says."""
    activations = activations_of(backend)
    os.environ[env.MODE.name] = "off" if activations is None else "on"
    if activations is not None:
        os.environ[env.ACTIVATIONS.name] = activations
    # SGLang would compile FlashInfer's norms and sampling, where no wheel brings them compiled.
    if not backend.startswith("flashinfer"):
        os.environ.setdefault("SGLANG_IS_FLASHINFER_AVAILABLE", "false")


def engine_options(job: dict[str, Any], on_gpu: bool) -> dict[str, Any]:
    """SGLang's server arguments for a job; the job's own `options` come last."""
    given = job["options"]
    most = max(job["batches"])
    options: dict[str, Any] = {
        "model_path": job["model"],
        "skip_tokenizer_init": True,
        "context_length": max(4096, 2 * job["prompt_tokens"]) if on_gpu else 1024,
        # Of all data-parallel ranks together.
        "max_running_requests": max(most, job["prompts"], 2) + _replicas(given) - 1,
        "chunked_prefill_size": 8192 if on_gpu else 1024,
        "disable_radix_cache": True,
        "skip_server_warmup": True,
        "log_level": "info",
        # In every build of SGLang, and needs no download.
        "attention_backend": "triton",
        "sampling_backend": "pytorch",
    }
    if job["random_weights"]:
        options["load_format"] = "dummy"
    if on_gpu:
        # Decode steps in CUDA graphs, of exactly the batches that are timed.
        steps = {-(-batch // _replicas(given)) for batch in job["batches"]}
        options |= {
            "mem_fraction_static": 0.88,
            "cuda_graph_bs_decode": sorted(steps),
            "disable_prefill_cuda_graph": True,
            "disable_flashinfer_autotune": True,
            # SGLang adds it by itself where several GPUs share a model.
            "enforce_disable_flashinfer_allreduce_fusion": True,
        }
    else:
        options |= {"device": "cpu", "max_total_tokens": 4096, "disable_cuda_graph": True}
    if activations_of(job["backend"]) is None and job["backend"] != DEFAULT:
        options["moe_runner_backend"] = job["backend"]
    return options | given


def _replicas(options: dict[str, Any]) -> int:
    """How many ranks have requests of their own, with DP attention or whole copies."""
    return int(options.get("dp_size", 1)) * int(options.get("attn_dp_size", 1))


def vocabulary_of(model: str) -> int:
    """The number of token ids that a checkpoint's config.json tells."""
    return int(json.loads((Path(model) / "config.json").read_text())["vocab_size"])


def _generate(engine: Any, prompts: list[list[int]], tokens: int) -> None:
    """Raises RuntimeError where SGLang generates other numbers of tokens."""
    sampling = {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True}
    answers = engine.generate(input_ids=prompts, sampling_params=sampling)
    generated = [len(answer["output_ids"]) for answer in answers]
    if generated != [tokens] * len(prompts):
        raise RuntimeError(f"{tokens} tokens were asked for, and SGLang generated {generated}")


if __name__ == "__main__":
    answer(sys.argv[1], measure)
