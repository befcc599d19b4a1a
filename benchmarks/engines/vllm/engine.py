"""One vLLM engine of run.py, in a process of its own:  engine.py MODE CHECKPOINT OUT.json"""

import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "shared"))
from tokens import PROMPTS, logits_beside
from vllm_engine import generate, prompt_logits

NO_AUTOTUNE = {"kernel_config": {"enable_flashinfer_autotune": False}}
OURS = {"quantization": "hopper_mxfp4"}
GRAPHS = {"enforce_eager": False}
MODES: dict[str, dict] = {
    "marlin": {"moe_backend": "marlin"},
    "triton": {"moe_backend": "triton"},
    "humming": {"moe_backend": "humming"},
    "flashinfer_cutlass": {"moe_backend": "flashinfer_cutlass", **NO_AUTOTUNE},
    "ours": OURS | NO_AUTOTUNE,
    "ours_autotuned": OURS,
    "ours_graphs": OURS | NO_AUTOTUNE | GRAPHS,
    "marlin_graphs": {"moe_backend": "marlin"} | GRAPHS,
    "ours_sleep": OURS | NO_AUTOTUNE | {"enable_sleep_mode": True},
    "marlin_tp2": {"moe_backend": "marlin", "tensor_parallel_size": 2},
    "ours_tp2": OURS | NO_AUTOTUNE | {"tensor_parallel_size": 2},
    "ours_tp2_ep": OURS | NO_AUTOTUNE | {"tensor_parallel_size": 2, "enable_expert_parallel": True},
    "ours_tp2_graphs": OURS | NO_AUTOTUNE | GRAPHS | {"tensor_parallel_size": 2},
}
DEFAULTS = {
    "skip_tokenizer_init": True,
    "max_model_len": 1024,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 1024,
    "enable_prefix_caching": False,
    "disable_log_stats": True,
    "enforce_eager": True,
    "gpu_memory_utilization": 0.4,
    "attention_backend": "TRITON_ATTN",
}
# For ranks that run.py starts as processes of one GPU.
SHARED_GPU = {
    "distributed_executor_backend": "external_launcher",
    "kv_cache_memory_bytes": 1 << 30,
}


def share_gpu() -> None:
    """Let vLLM's ranks, one process each, use the same GPU.

    NCCL refuses two ranks on one GPU, so vLLM is given its plainest communicator, over gloo, whose
    collectives go through the host's memory here.
    """
    import torch
    import torch.distributed as dist
    from vllm.platforms import current_platform

    base = "vllm.distributed.device_communicators.base_device_communicator.DeviceCommunicatorBase"
    type(current_platform).dist_backend = "gloo"
    type(current_platform).get_device_communicator_cls = classmethod(lambda cls: base)

    def on_host(a):
        if not torch.is_tensor(a):
            return a
        return (a.float() if a.dtype == torch.bfloat16 else a).cpu()

    def through_host(original):
        def collective(out, *args, async_op=False, **kwargs):
            received = on_host(out)
            original(received, *map(on_host, args), **kwargs)
            out.copy_(received)

        return collective

    for name in ("all_reduce", "all_gather_into_tensor", "broadcast"):
        setattr(dist, name, through_host(getattr(dist, name)))


def measure_loading() -> dict:
    """Filled in when a worker of this process loads its model: seconds, peak GiB and kept GiB."""
    import torch
    from vllm.v1.worker.gpu_worker import Worker

    loading: dict = {}

    def load_model(self, *args, original=Worker.load_model, **kwargs):
        torch.cuda.reset_peak_memory_stats()
        # vLLM resets the peak each time it looks at the memory, while it loads too.
        torch.cuda.reset_peak_memory_stats = lambda *args: None
        torch.accelerator.reset_peak_memory_stats = lambda *args: None
        before, start = torch.cuda.memory_allocated(), time.time()
        original(self, *args, **kwargs)
        loading["load_s"] = time.time() - start
        loading["peak_gib"] = (torch.cuda.max_memory_allocated() - before) / 2**30
        loading["kept_gib"] = (torch.cuda.memory_allocated() - before) / 2**30

    Worker.load_model = load_model
    return loading


def calls(model) -> dict:
    from hopper_mxfp4.cli.demo import CALLS
    from hopper_mxfp4.registry import kernels

    return {name: CALLS.get(name, 0) for name in kernels()}


def layers(model) -> dict:
    """Which methods and kernels the experts of a rank's model have."""
    found: dict = {}
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if "Experts" in type(module).__name__ and method is not None:
            kernel = getattr(method, "kernel", None) or getattr(method, "mxfp4_backend", None)
            name = f"{type(method).__name__} {getattr(kernel, 'name', kernel)}"
            found[name] = found.get(name, 0) + 1
    return found


def after_sleep(llm, answers: list) -> dict:
    """Whether the tokens are the same after both levels of sleep."""

    def same() -> bool:
        again = generate(llm, PROMPTS)
        return [a["tokens"] for a in again] == [a["tokens"] for a in answers]

    llm.sleep(level=1)
    llm.wake_up()
    found = {"tokens_after_sleep_1": same()}
    llm.sleep(level=2)
    llm.wake_up(tags=["weights"])
    llm.collective_rpc("reload_weights")
    llm.wake_up(tags=["kv_cache"])
    found["tokens_after_sleep_2_and_reload"] = same()
    return found


def main(mode: str, checkpoint: str, out: Path) -> None:
    options = MODES[mode]
    shared = "RANK" in os.environ
    reports = os.environ.get("RANK", "0") == "0"
    one_process = shared or options.get("tensor_parallel_size", 1) == 1
    os.environ |= {
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    }
    import torch
    from vllm import LLM

    from hopper_mxfp4.cli.demo import count_calls

    count_calls()
    loading = measure_loading()
    if shared:
        share_gpu()
        options = options | SHARED_GPU
    began = time.time()
    llm = LLM(model=checkpoint, **DEFAULTS | options)
    result: dict = {"mode": mode, "ready_s": time.time() - began, "loading": loading}
    result["layers"] = llm.apply_model(layers)
    if not one_process:
        llm.apply_model(count_calls)
    result["answers"] = generate(llm, PROMPTS)
    # Since the process began, so with the warm-up and captures of CUDA graphs.
    result["calls"] = llm.apply_model(calls)
    if one_process:
        logits = prompt_logits(llm)
        if reports:
            torch.save(logits, logits_beside(out))
    if options.get("enable_sleep_mode"):
        result |= after_sleep(llm, result["answers"])
    result["ranks_share_a_gpu"] = shared
    if reports:
        out.write_text(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
