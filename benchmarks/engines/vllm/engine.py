"""One vLLM engine of run.py, in a process of its own:  engine.py MODE CHECKPOINT OUT.json"""

import json
import os
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "shared"))
from tokens import PROMPTS, Answer, compare, logits_beside
from vllm_engine import NO_MULTICAST, generate, prompt_logits

NO_AUTOTUNE = {"kernel_config": {"enable_flashinfer_autotune": False}}
OURS = {"quantization": "hopper_mxfp4"} | NO_AUTOTUNE
MARLIN = {"moe_backend": "marlin"}
GRAPHS = {"enforce_eager": False}
EP = {"enable_expert_parallel": True}


def tp(ranks: int) -> dict:
    return {"tensor_parallel_size": ranks}


def eplb(**how) -> dict:
    """Two experts more than the model has, and a new placement after every eighth step."""
    often = {"window_size": 8, "step_interval": 8, "num_redundant_experts": 2}
    return tp(2) | EP | {"enable_eplb": True, "eplb_config": often | how}


@dataclass(frozen=True)
class Mode:
    """An engine to run. engines: of data parallelism, a process each, with experts spread over all.
    against: the modes that its tokens are compared with. checkpoint: which of run.py's it reads.
    environment: its own variables.
    """

    options: dict
    against: tuple[str, ...] = ("marlin",)
    engines: int = 1
    checkpoint: str = "gpt-oss"
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def gpus(self) -> int:
        return self.engines * self.options.get("tensor_parallel_size", 1)


MODES = {
    "marlin": Mode(MARLIN, ()),
    "triton": Mode({"moe_backend": "triton"}),
    "humming": Mode({"moe_backend": "humming"}),
    "flashinfer_cutlass": Mode({"moe_backend": "flashinfer_cutlass"} | NO_AUTOTUNE),
    "ours": Mode(OURS),
    "ours_autotuned": Mode({"quantization": "hopper_mxfp4"}),
    "ours_sleep": Mode(OURS | {"enable_sleep_mode": True}),
    # Compiled is compared with compiled: torch.compile rounds at other places than the eager model.
    "marlin_graphs": Mode(MARLIN | GRAPHS, ("marlin",)),
    "ours_graphs": Mode(OURS | GRAPHS, ("marlin_graphs", "ours")),
}
# Several GPUs: Marlin against Marlin on one; ours against both Marlin in the same mode and ours on
# one.
for how, options, engines in (
    ("tp2", tp(2), 1),
    ("tp4", tp(4), 1),
    ("tp2_ep", tp(2) | EP, 1),
    ("tp4_ep", tp(4) | EP, 1),
    ("tp2_graphs", tp(2) | GRAPHS, 1),
    ("tp4_graphs", tp(4) | GRAPHS, 1),
    ("tp2_ep_graphs", tp(2) | EP | GRAPHS, 1),
    ("tp4_ep_graphs", tp(4) | EP | GRAPHS, 1),
    ("dp2_ep", EP, 2),
    ("dp2_ep_graphs", EP | GRAPHS, 2),
):
    one = "_graphs" if GRAPHS.items() <= options.items() else ""
    MODES[f"marlin_{how}"] = Mode(MARLIN | options, (f"marlin{one}",), engines)
    MODES[f"ours_{how}"] = Mode(OURS | options, (f"marlin_{how}", f"ours{one}"), engines)
# vLLM's GPT-OSS has no EPLB, its Qwen3-MoE has; and stock vLLM moves no experts of that checkpoint.
for name, options, against in (
    ("qwen_marlin", MARLIN, ()),
    ("qwen_ours", OURS, ("qwen_marlin",)),
    ("qwen_ours_ep", OURS | tp(2) | EP, ("qwen_marlin", "qwen_ours")),
    (
        "qwen_ours_eplb",
        OURS | eplb(use_async=False, communicator="torch_gloo"),
        ("qwen_marlin", "qwen_ours"),
    ),
    (
        "qwen_ours_eplb_async",
        OURS | eplb(use_async=True, communicator="torch_gloo"),
        ("qwen_marlin", "qwen_ours"),
    ),
    (
        "qwen_ours_eplb_graphs",
        OURS | GRAPHS | eplb(use_async=False, communicator="torch_gloo"),
        ("qwen_ours_eplb",),
    ),
):
    MODES[name] = Mode(options, against, checkpoint="qwen3-moe")
# DeepSeek-V4 (engines/deepseek_v4 says what it needs): up to 64 tokens a step each of its GEMMs has
# one kernel, so that there is little to compile. "default" is what vLLM takes, with 8-bit
# activations; ours has BF16 ones, as Marlin has, but for ours_fp8.
DSV4 = {
    "max_num_batched_tokens": int(os.environ.get("DSV4_BATCH", "64")),
    "kv_cache_dtype": "fp8",
    "attention_backend": None,
}
DSV4_GRAPHS = GRAPHS | {
    "compilation_config": {
        "mode": 0,
        "cudagraph_mode": "FULL_DECODE_ONLY",
        "cudagraph_capture_sizes": [1, 2, 4],
    },
    "kernel_config": {"enable_flashinfer_autotune": False, "enable_jit_warmup": False},
}
BF16, FP8 = ({"HOPPER_MXFP4_ACTIVATIONS": activations} for activations in ("bf16", "fp8"))
for how, options in (
    ("", {}),
    ("_graphs", DSV4_GRAPHS),
    ("_tp2", tp(2)),
    ("_ep2", tp(2) | EP),
    ("_tp2_graphs", tp(2) | DSV4_GRAPHS),
    ("_ep2_graphs", tp(2) | EP | DSV4_GRAPHS),
    ("_tp4", tp(4)),
    ("_ep4", tp(4) | EP),
    ("_eplb", eplb(use_async=False, communicator="torch_gloo")),
):
    for backend, choice, environment in (
        ("default", {}, {}),
        ("humming", {"moe_backend": "humming"}, {}),
        ("marlin", MARLIN, {}),
        ("flashinfer_cutlass", {"moe_backend": "flashinfer_cutlass"} | NO_AUTOTUNE, {}),
        ("ours", OURS, BF16),
        ("ours_fp8", OURS, FP8),
    ):
        name = f"dsv4_{backend}{how}"
        # All against ours with BF16 activations: how far do 8-bit ones move the logits?
        against = dict.fromkeys(
            ("dsv4_marlin", "dsv4_ours", f"dsv4_{backend}", f"dsv4_ours{how}", f"dsv4_default{how}")
        )
        MODES[name] = Mode(
            DSV4 | choice | options,
            tuple(other for other in against if other != name),
            checkpoint="deepseek-v4",
            environment=environment,
        )
DEFAULTS = {
    "skip_tokenizer_init": True,
    "max_model_len": 1024,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 1024,
    "enable_prefix_caching": False,
    "disable_log_stats": True,
    "enforce_eager": True,
}
# Engines may share a GPU, so that none takes what is free, or expects what is free to stay so.
ON_GPU = {
    "gpu_memory_utilization": 0.2,
    "kv_cache_memory_bytes": 1 << 30,
    "attention_backend": "TRITON_ATTN",
}
# torch.compile's fused all-reduce is FlashInfer's, which NO_MULTICAST leaves out otherwise.
COMPILED = {"compilation_config": {"pass_config": {"fuse_allreduce_rms": False}}}
# For ranks that run.py starts as processes of one GPU.
SHARED_GPU = {"distributed_executor_backend": "external_launcher"}
REARRANGED_ROUNDS = 6


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


def count_rearrangements(worker) -> None:
    """From now on, in this worker."""
    from vllm.distributed.eplb.eplb_state import EplbState

    worker.rearrangements = 0

    def rearrange(self, *args, original=EplbState.rearrange, **kwargs):
        worker.rearrangements += 1
        return original(self, *args, **kwargs)

    EplbState.rearrange = rearrange


def rearrangements(worker) -> int:
    return worker.rearrangements


def placement(worker) -> list[int]:
    """The expert in each slot of all ranks, layer by layer."""
    states = worker.model_runner.eplb_state.model_states.values()
    return [e for state in states for e in state.physical_to_logical_map.flatten().tolist()]


def while_experts_move(llm, answers: list[Answer]) -> dict:
    """Whether the tokens stay the same. Before each round another prompt has all of the load."""
    llm.collective_rpc(count_rearrangements)
    was, moved, said = llm.collective_rpc(placement)[0], [], []
    for round_ in range(REARRANGED_ROUNDS):
        generate(llm, [PROMPTS[round_ % len(PROMPTS)]] * len(PROMPTS))
        again = generate(llm, PROMPTS)
        now = llm.collective_rpc(placement)[0]
        moved.append(sum(a != b for a, b in zip(was, now, strict=True)))
        said.append(compare(answers, again, "before")["tokens"])
        was = now
    return {
        "rearrangements": llm.collective_rpc(rearrangements),
        "slots_with_another_expert": moved,
        "tokens_as_at_first": said,
    }


def bind_nccl() -> None:
    """Raises what vLLM swallows where its own binding of NCCL lacks a symbol: tensor parallelism
    then goes on without it, and data parallelism fails in an assertion that names no cause.
    """
    from vllm.distributed.device_communicators.pynccl_wrapper import NCCLLibrary

    NCCLLibrary()


def stand_ins(options: dict, engines: int) -> dict:
    """For what vLLM's CPU engine lacks: modules in tests/vllm."""
    if options.get("enable_eplb"):
        import cpu_eplb

        return {"worker_extension_cls": f"{cpu_eplb.__name__}.Extension"}
    return {"worker_extension_cls": "cpu_all_to_all.Extension"} if engines > 1 else {}


def main(mode: str, checkpoint: str, out: Path) -> None:
    shared = "RANK" in os.environ  # with other ranks, this process's GPU
    first = os.environ.get("RANK", "0") == "0"
    engine = int(os.environ.get("VLLM_DP_RANK", 0))
    engines = int(os.environ.get("VLLM_DP_SIZE", 1))
    one_process = shared or MODES[mode].gpus == 1
    os.environ |= {
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
        **NO_MULTICAST,
        **MODES[mode].environment,
    }
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; else most of a CPU's memory
    import torch
    from vllm import LLM

    from hopper_mxfp4.cli.demo import count_calls

    count_calls()
    on_gpu = torch.cuda.is_available()
    loading = measure_loading() if on_gpu else {}
    options = DEFAULTS | (ON_GPU if on_gpu else {}) | MODES[mode].options
    if not options["enforce_eager"]:
        options = COMPILED | options
    if shared:
        share_gpu()
        options |= SHARED_GPU
    if not on_gpu:
        options |= stand_ins(options, engines)
    elif engines > 1:
        bind_nccl()
    began = time.time()
    llm = LLM(model=checkpoint, **options)
    result: dict = {"mode": mode, "ready_s": time.time() - began, "loading": loading}
    result["layers"] = llm.apply_model(layers)
    if not one_process:
        llm.apply_model(count_calls)
    result["answers"] = generate(llm, PROMPTS[engine::engines])
    # Since the process began, so with the warm-up and captures of CUDA graphs.
    result["calls"] = llm.apply_model(calls)
    try:
        logits = prompt_logits(llm)
        if first:
            torch.save(logits, logits_beside(out))
    except Exception:  # the tokens are worth reporting without them
        traceback.print_exc()
    if options.get("enable_sleep_mode"):
        result |= after_sleep(llm, result["answers"])
    if options.get("enable_eplb"):
        result |= while_experts_move(llm, result["answers"])
    result["ranks_share_a_gpu"] = shared
    if first:
        out.write_text(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
