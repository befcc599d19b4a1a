"""The demo's engine process: a real vLLM engine with the plugin, in this process, where the demo
can look into it.
"""

import os
import sys
import time
from typing import Any

from hopper_mxfp4.bench.jobs import answer
from hopper_mxfp4.cli.demo import CALLS, count_calls

from .selection import NAME


def generate(job: dict[str, Any]) -> dict[str, Any]:
    """The job's prompts through one engine; ``options`` of the job go to vLLM.

    Calls are those of this process.
    """
    set_environment()
    import torch
    import vllm

    count_calls()
    began = time.time()
    on_gpu = torch.cuda.is_available()
    # Triton's attention is in every build and needs no download.
    options: dict[str, Any] = (
        {"attention_backend": "TRITON_ATTN", "gpu_memory_utilization": 0.3} if on_gpu else {}
    )
    llm = vllm.LLM(
        model=job["model"],
        quantization=NAME,
        skip_tokenizer_init=True,
        enforce_eager=True,
        enable_prefix_caching=False,
        max_model_len=512,
        max_num_batched_tokens=512,
        max_num_seqs=4,
        **options | job.get("options", {}),
    )
    ready = time.time()
    CALLS.clear()  # the engine's own warm-up
    sampling = vllm.SamplingParams(
        temperature=0, max_tokens=job["tokens"], ignore_eos=True, detokenize=False
    )
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in job["prompts"]], sampling)
    generated = time.time()
    return {
        "engine": f"vLLM {vllm.__version__}",
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "kernel": ", ".join(CALLS),
        "calls": sum(CALLS.values()),
        "layers": sum(llm.apply_model(_count_layers)),
        "load_s": ready - began,
        "generate_s": generated - ready,
    }


def set_environment() -> None:
    """For an engine in this process that is told its weights by a path. Before vLLM's import."""
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    # For functions applied to the model to reach other ranks' processes.
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    # Greedy decoding needs no sampler, and FlashInfer may have to compile its own first.
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    # In GiB; the default is most of the machine's memory.
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


def _count_layers(model: Any) -> int:
    from .layer import PreparedMoEMethod

    return sum(
        isinstance(getattr(module, "quant_method", None), PreparedMoEMethod)
        for module in model.modules()
    )


if __name__ == "__main__":
    answer(sys.argv[1], generate)
