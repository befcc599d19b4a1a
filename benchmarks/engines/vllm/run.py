#!/usr/bin/env python3
"""Whole vLLM engines on Hopper, this package beside the stock backends, in one run on one checkpoint.

    vllm_gpu.py FOLDER OUT.json [--modes marlin,ours,..] [--checkpoint LAYERS,HIDDEN,INTERMEDIATE,EXPERTS,TOP_K]

Each mode is an engine in a process of its own: its greedy tokens, the logits of every prompt position,
load time, peak memory while loading, and how often this package's kernel was called (or captured). The
modes of one GPU run side by side on as many as there are. Each is compared with Marlin in the same
mode; where tokens part, the margin of Marlin's choice is given. Where there are fewer GPUs than ranks, the
ranks share one and gloo adds up their parts through the host (NCCL takes one rank per GPU).
"""

import argparse
import json
import os
import queue
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

NO_AUTOTUNE = {"kernel_config": {"enable_flashinfer_autotune": False}}
OURS = {"quantization": "hopper_mxfp4"}
GRAPHS = {"enforce_eager": False}
MODES = {
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
AGAINST = {"ours_graphs": "marlin_graphs"}  # compiled with compiled: torch.compile rounds elsewhere
PROMPTS = [
    [5, 7, 9, 11, 300, 20],
    list(range(3, 203)),
    [(37 * i) % 1000 + 3 for i in range(64)],
    [9, 8, 7] * 20,
]
TOKENS = 16


def share_gpu() -> None:
    """Let vLLM's ranks, one process each, use the same GPU: its plainest communicator over gloo, through the host."""
    import torch
    import torch.distributed as dist
    from vllm.platforms import current_platform

    base = "vllm.distributed.device_communicators.base_device_communicator.DeviceCommunicatorBase"
    type(current_platform).dist_backend = "gloo"
    type(current_platform).get_device_communicator_cls = classmethod(lambda cls: base)

    def through_host(original):
        def collective(out, *args, async_op=False, **kwargs):
            def host(a):
                return (
                    (a.float() if a.dtype == torch.bfloat16 else a).cpu()
                    if torch.is_tensor(a)
                    else a
                )

            received = host(out)
            original(received, *map(host, args), **kwargs)
            out.copy_(received)

        return collective

    for name in ("all_reduce", "all_gather_into_tensor", "broadcast"):
        setattr(dist, name, through_host(getattr(dist, name)))


def engine(mode: str, checkpoint: str, out: Path) -> None:
    options = MODES[mode]
    shared = "RANK" in os.environ
    one_process = shared or options.get("tensor_parallel_size", 1) == 1
    os.environ |= {
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
    import torch
    from vllm import LLM, SamplingParams
    from vllm.v1.worker.gpu_worker import Worker

    from hopper_mxfp4.cli.demo import count_calls

    loading: dict = {}
    count_calls()

    def load_model(self, *args, original=Worker.load_model, **kwargs):
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.reset_peak_memory_stats = torch.accelerator.reset_peak_memory_stats = (
            lambda *args: None
        )  # vLLM resets it at every look
        before, start = torch.cuda.memory_allocated(), time.time()
        original(self, *args, **kwargs)
        loading["load_s"] = time.time() - start
        loading["peak_gib"] = (torch.cuda.max_memory_allocated() - before) / 2**30
        loading["kept_gib"] = (torch.cuda.memory_allocated() - before) / 2**30

    Worker.load_model = load_model
    if shared:
        share_gpu()
        options = options | {
            "distributed_executor_backend": "external_launcher",
            "kv_cache_memory_bytes": 1 << 30,
        }
    began = time.time()
    defaults = {
        "enforce_eager": True,
        "gpu_memory_utilization": 0.4,
        "attention_backend": "TRITON_ATTN",
    }
    llm = LLM(
        model=checkpoint,
        skip_tokenizer_init=True,
        max_model_len=1024,
        max_num_seqs=8,
        max_num_batched_tokens=1024,
        enable_prefix_caching=False,
        disable_log_stats=True,
        **defaults | options,
    )
    result: dict = {"mode": mode, "ready_s": time.time() - began, "loading": loading}
    result["layers"] = llm.apply_model(layers)
    if not one_process:
        llm.apply_model(count_calls)
    greedy = SamplingParams(
        temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False, logprobs=2
    )

    def tokens() -> list:
        outputs = llm.generate([{"prompt_token_ids": p} for p in PROMPTS], greedy, use_tqdm=False)
        result["margins"] = [
            [
                abs(a.logprob - b.logprob)
                for a, b in [
                    sorted(step.values(), key=lambda o: -o.logprob)[:2]
                    for step in o.outputs[0].logprobs
                ]
            ]
            for o in outputs
        ]
        return [list(o.outputs[0].token_ids) for o in outputs]

    result["tokens"] = tokens()
    result["calls"] = llm.apply_model(
        calls
    )  # since the process began, its warm-up and captures among them
    if one_process:
        seen: list = []
        llm.apply_model(
            lambda model: (
                model.logits_processor.register_forward_hook(
                    lambda m, i, o: seen.append(o.float().cpu())
                )
                and None
            )
        )
        prompt = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        logits = []
        for p in PROMPTS:
            seen.clear()
            llm.generate([{"prompt_token_ids": p}], prompt, use_tqdm=False)
            logits.append(torch.cat(seen)[: len(p)])
        if os.environ.get("RANK", "0") == "0":
            torch.save(logits, out.with_suffix(".logits.pt"))
    if options.get("enable_sleep_mode"):
        before = result["tokens"]
        llm.sleep(level=1)
        llm.wake_up()
        result["tokens_after_sleep_1"] = tokens() == before
        llm.sleep(level=2)
        llm.wake_up(tags=["weights"])
        llm.collective_rpc("reload_weights")
        llm.wake_up(tags=["kv_cache"])
        result["tokens_after_sleep_2_and_reload"] = tokens() == before
    result["ranks_share_a_gpu"] = shared
    if os.environ.get("RANK", "0") == "0":
        out.write_text(json.dumps(result))


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


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def compare(first: dict, other: dict, folder: Path) -> None:
    import torch

    rows = []
    for a, b, margins in zip(first["tokens"], other["tokens"], first["margins"], strict=True):
        at = next((i for i, (s, t) in enumerate(zip(a, b, strict=True)) if s != t), None)
        rows.append(
            "equal"
            if at is None
            else f"part at token {at}, where {first['mode']} chose by {margins[at]:.4f} nats"
        )
    other["tokens_against_" + first["mode"]] = rows
    paths = [folder / f"{r['mode']}.logits.pt" for r in (first, other)]
    if all(p.exists() for p in paths):
        pairs = list(zip(*(torch.load(p) for p in paths), strict=True))
        other["max_logit_difference"] = max((a - b).abs().max().item() for a, b in pairs)
        other["mean_logit_difference"] = sum((a - b).abs().mean().item() for a, b in pairs) / len(
            pairs
        )
        other["largest_logit"] = max(a.abs().max().item() for a, _ in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--modes",
        default="marlin,ours,marlin_graphs,ours_graphs,triton,flashinfer_cutlass,ours_sleep",
    )
    parser.add_argument("--checkpoint", default="1,2880,2880,32,4")
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    args = parser.parse_args()
    checkpoint = args.folder / "checkpoint"
    if args.engine:
        engine(args.engine, str(checkpoint), args.folder / f"{args.engine}.json")
        return
    import torch

    from hopper_mxfp4 import __version__
    from hopper_mxfp4.cli.random_checkpoint import write_gpt_oss
    from hopper_mxfp4.kernels.flashinfer import compat

    sizes = dict(
        zip(
            ("layers", "hidden", "intermediate", "experts", "top_k"),
            map(int, args.checkpoint.split(",")),
            strict=True,
        )
    )
    write_gpt_oss(checkpoint, **sizes)
    gpus: queue.Queue = queue.Queue()
    given = os.environ.get(
        "CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count())))
    )
    for gpu in given.split(","):
        gpus.put(gpu)

    def run(mode: str) -> dict:
        ranks = MODES[mode].get("tensor_parallel_size", 1)
        gpu = gpus.get() if ranks == 1 else None
        began, log, file = time.time(), args.folder / f"{mode}.log", args.folder / f"{mode}.json"
        command = [sys.executable, __file__, str(args.folder), str(args.out), "--engine", mode]
        visible = {} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}
        places = [visible]
        if ranks > torch.cuda.device_count():
            meet = {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(free_port()),
                "WORLD_SIZE": str(ranks),
                "LOCAL_RANK": "0",
            }
            places = [meet | {"RANK": str(rank)} for rank in range(ranks)]
        with log.open("w") as stream:
            started = [
                subprocess.Popen(
                    command, stdout=stream, stderr=subprocess.STDOUT, env=os.environ | place
                )
                for place in places
            ]
            codes = [process.wait() for process in started]
        if gpu is not None:
            gpus.put(gpu)
        result = (
            json.loads(file.read_text())
            if not any(codes) and file.exists()
            else {"mode": mode, "failed": log.read_text()[-1500:]}
        )
        print(f"{mode} done in {time.time() - began:.0f} s", flush=True)
        return result

    modes = args.modes.split(",")
    single = [mode for mode in modes if "tensor_parallel_size" not in MODES[mode]]
    with ThreadPoolExecutor(gpus.qsize()) as pool:
        results = dict(zip(single, pool.map(run, single), strict=True))
    versions = {
        "hopper-mxfp4": __version__,
        "torch": torch.__version__,
        "flashinfer": str(compat.flashinfer_version()),
    }
    versions["vllm"] = metadata.version("vllm")
    report = {
        "when": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "versions": versions,
        "checkpoint": sizes,
    }

    def finish(mode: str) -> None:
        result = results[mode]
        first = results.get(AGAINST.get(mode, "marlin"), results.get("ours", result))
        if first is not result and "failed" not in result and "failed" not in first:
            compare(first, result, args.folder)
        print(
            mode,
            json.dumps({k: v for k, v in result.items() if k not in ("tokens", "margins", "mode")})[
                :1200
            ],
            flush=True,
        )
        # after each, so that a run cut short has shown something
        args.out.write_text(json.dumps(report | {"modes": list(results.values())}, indent=1) + "\n")

    for mode in single:
        finish(mode)
    for mode in modes:
        if mode not in single:
            results[mode] = run(mode)
            finish(mode)


if __name__ == "__main__":
    main()
