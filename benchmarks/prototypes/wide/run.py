"""Checks and times the wide kernel on a Hopper GPU. `run.py build` compiles and needs no GPU."""

import argparse
import itertools
import json
import os
import re
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
import truth
from layer import CONFIGS, Config, WideLayer, compile_cubin, layer_macros

GPT_OSS, DEEPSEEK = (1.702, 1.0, 7.0), (1.0, 0.0, 10.0)
BODIES = {  # experts, hidden, inter, top_k, swiglu, bias
    "gpt-oss-20b": (32, 2880, 2880, 4, GPT_OSS, True),
    "gpt-oss-120b": (128, 2880, 2880, 4, GPT_OSS, True),
    "dsv4-flash": (256, 4096, 2048, 6, DEEPSEEK, False),
}
TOKENS = (128, 256, 512, 1024, 2048, 4096, 8192)


def random_weights(experts, hidden, inter, bias, spread=4) -> dict:
    def matrix(rows, k):
        w = torch.randint(0, 256, (experts, rows, k // 2), dtype=torch.uint8, device="cuda")
        s = torch.randint(
            119 - spread, 119 + spread, (experts, rows, k // 32), dtype=torch.uint8, device="cuda"
        )
        return w, s

    w13, s13 = matrix(2 * inter, hidden)
    w2, s2 = matrix(hidden, inter)
    b13 = torch.randn(experts, 2 * inter, device="cuda").bfloat16() if bias else None
    b2 = torch.randn(experts, hidden, device="cuda").bfloat16() if bias else None
    return {"w13": w13, "s13": s13, "b13": b13, "w2": w2, "s2": s2, "b2": b2}


def random_x(tokens, hidden, kind="normal") -> torch.Tensor:
    x = torch.randn(tokens, hidden, device="cuda")
    if kind == "heavy":
        x = x * torch.exp(1.5 * torch.randn_like(x))
    if kind == "outlier":
        x[:, 7] = 1000
    return (x * (0.3 if kind != "heavy" else 0.1)).bfloat16()


def random_ids(tokens, experts, top_k, skew=False, holes=0.0) -> torch.Tensor:
    score = torch.rand(tokens, experts, device="cuda")
    if skew:  # popularity falls with the power -0.8 of the rank, as served models' often does
        rank = torch.arange(1, experts + 1, device="cuda").float()
        score = torch.log(rank.pow(-0.8)) - torch.log(-torch.log(score))
    ids = score.topk(top_k, 1).indices.int()
    if holes:
        gone = torch.rand(ids.shape, device="cuda") < holes
        ids = torch.where(gone, torch.where(ids % 2 == 0, -1, experts + 5).int(), ids)
    return ids.contiguous()


def call(layer, x, ids, topw, poison=False) -> torch.Tensor:
    b = layer.buffers(len(x))
    if poison:
        for v in b.values():
            v.fill_(float("nan") if v.dtype == torch.bfloat16 else 0x7FFFFFF0)
    launches, out = layer.plan(x, ids, topw, b)
    for go in launches.values():
        go()
    torch.cuda.synchronize()
    return out


def check_one(config, shape, tokens, kind="normal", skew=False, holes=0.0, dtype=torch.float32):
    experts, hidden, inter, top_k, swiglu, bias = shape
    weights = random_weights(experts, hidden, inter, bias)
    layer = WideLayer(config, **weights, top_k=top_k, swiglu=swiglu)
    worst = 0.0
    for m in tokens:
        x, ids = random_x(m, hidden, kind), random_ids(m, experts, top_k, skew, holes)
        topw = torch.rand(m, top_k, device="cuda")
        got = call(layer, x, ids, topw, poison=True)
        again = call(layer, x, ids, topw, poison=True)
        want = truth.layer(weights, x, ids, topw, swiglu, dtype)
        e = truth.error(got, want)
        same = torch.equal(got, again)
        row_worst = float(((got - want).norm(dim=1) / want.norm(dim=1).clamp(min=1e-20)).max())
        ok = e < 3.3e-3 and same
        worst = max(worst, e)
        if not ok or len(tokens) < 9:
            print(
                f"{'ok ' if ok else 'BAD'} E{experts} H{hidden} I{inter} top{top_k} m{m} {kind} "
                f"skew={int(skew)} holes={holes}: {e:.2e} worst row {row_worst:.2e} "
                f"repeat={same}",
                flush=True,
            )
    return worst


SHAPES = {
    "tiny": (4, 128, 64, 2, GPT_OSS, True),
    "odd": (5, 160, 96, 3, DEEPSEEK, True),
    "shard": (8, 2880, 736, 4, GPT_OSS, True),
    "288": (12, 512, 288, 6, DEEPSEEK, False),
    "one": (1, 256, 256, 1, GPT_OSS, False),
}
DENSE = (1, 2880, 2880, 1, GPT_OSS, True)


def check(config: Config, full: bool) -> None:
    if full:
        for body in ("gpt-oss-20b", "dsv4-flash"):
            for kind in ("normal", "heavy", "outlier"):
                check_one(config, BODIES[body], (150, 700), kind)
            check_one(config, BODIES[body], (3000,), skew=True, holes=0.1)
        return
    for name in ("tiny", "odd", "one"):
        check_one(config, SHAPES[name], (1, 2, 7, 33, 130, 511), dtype=torch.float64)
        check_one(config, SHAPES[name], (64, 300), holes=0.3, dtype=torch.float64)
    check_one(config, SHAPES["shard"], (5, 200, 1111), skew=True)
    check_one(config, SHAPES["288"], (77, 900), holes=0.2)


def graph_time(launches, seconds=0.25) -> float:
    """Median microseconds of a graph of these launches."""
    for go in launches:
        go()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for go in launches:
            go()
    graph.replay()
    torch.cuda.synchronize()
    times, end = [], time.time() + seconds
    while time.time() < end or len(times) < 5:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(11)]
        events[0].record()
        for event in events[1:]:
            graph.replay()
            event.record()
        torch.cuda.synchronize()
        times += [1e3 * a.elapsed_time(b) for a, b in itertools.pairwise(events)]
    return statistics.median(times)


def stats(launches, flops) -> dict:
    """gemm: without its routing, which it needs each time (the counters of its tiles)."""
    go = list(launches.values())
    times = ((2, 0.05), (3, 0.05), (4, 0.1), (5, 0.25))
    route, tokens, gemm, total = (graph_time(go[:n], t) for n, t in times)
    return {
        "us": round(total, 1),
        "tflops": round(flops / total / 1e6),
        "route": round(route, 1),
        "tokens": round(tokens - route, 1),
        "gemm": round(gemm - tokens, 1),
        "sum": round(total - gemm, 1),
    }


def bench(names, bodies, tokens, skews, overrides) -> list[dict]:
    rows = []
    for body in bodies:
        experts, hidden, inter, top_k, swiglu, bias = BODIES[body]
        weights = random_weights(experts, hidden, inter, bias)
        made = {}
        for name in names:
            config = replace(CONFIGS[name], **overrides)
            made[name] = WideLayer(config, **weights, top_k=top_k, swiglu=swiglu)
        del weights
        for skew in skews:
            for m in tokens:
                x, topw = random_x(m, hidden), torch.rand(m, top_k, device="cuda")
                ids = random_ids(m, experts, top_k, bool(skew))
                for name, layer in made.items():
                    launches, _ = layer.plan(x, ids, topw)
                    flops = 6 * m * top_k * hidden * inter
                    row = {"body": body, "m": m, "skew": skew, "config": name}
                    rows.append(row | stats(launches, flops))
                    print(rows[-1], flush=True)
    return rows


def dense(names, overrides) -> list[dict]:
    """One expert, 8192 tokens, 5760 x 2880 and 2880 x 2880, beside cuBLAS."""
    x, *b = (torch.randn(n, 2880, device="cuda").bfloat16() for n in (8192, 5760, 2880))
    flops = 6 * 8192 * 2880 * 2880
    us = graph_time([lambda: x @ b[0].T, lambda: x @ b[1].T])
    rows = [{"config": "cublas", "us": round(us, 1), "tflops": round(flops / us / 1e6)}]
    print(rows[0], flush=True)
    weights = random_weights(1, 2880, 2880, True)
    ids, topw = torch.zeros(8192, 1, dtype=torch.int32, device="cuda"), torch.rand(8192, 1).cuda()
    for name in names:
        layer = WideLayer(replace(CONFIGS[name], **overrides), **weights, top_k=1)
        launches, _ = layer.plan(random_x(8192, 2880), ids, topw)
        rows.append({"config": name, **overrides} | stats(launches, flops))
        print(rows[-1], flush=True)
    return rows


def build(configs, bodies) -> None:
    """Compiles for checks (no bodies) or benchmarks; says where ptxas spilled or serialised."""
    shapes = (
        [DENSE if b == "dense" else BODIES[b] for b in bodies] if bodies else list(SHAPES.values())
    )
    jobs = [j for c in configs for s in shapes for j in layer_macros(c, s[1], s[2], s[0], s[3])]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        logs = pool.map(lambda j: compile_cubin(*j)[1], jobs)
        for (source, macros), log in zip(jobs, logs, strict=True):
            notes = re.findall(
                r"Used \d+ registers|[1-9]\d* bytes spill \w+|serialized|C75\d\d", log
            )
            if source == "wide.cu":
                print(macros["NWG"], macros["WM"], macros["NMAX"], macros["K1"], notes, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("mode", choices=("check", "bench", "dense", "build"))
    parser.add_argument("--configs", default="3x1x192")
    parser.add_argument("--bodies", default="gpt-oss-20b")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--skew", default="0")
    parser.add_argument("--set", nargs="*", default=[], help="field=value of the configuration")
    parser.add_argument("--full", action="store_true", help="check whole layers, not odd ones")
    parser.add_argument("--out")
    o = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(1)
    names = o.configs.split(",")
    overrides = {k: int(v) for k, v in (s.split("=") for s in o.set)}
    if o.mode == "build":
        bodies = [b for b in o.bodies.split(",") if b]
        build([replace(CONFIGS[name], **overrides) for name in names], bodies)
        return
    if o.mode == "check":
        for name in names:
            print("check", name, overrides, flush=True)
            check(replace(CONFIGS[name], **overrides), o.full)
        return
    if o.mode == "dense":
        rows = dense(names, overrides)
    else:
        tokens = [int(m) for m in o.tokens.split(",")]
        skews = [int(s) for s in o.skew.split(",")]
        rows = bench(names, o.bodies.split(","), tokens, skews, overrides)
    if o.out:
        with Path(o.out).open("a") as f:
            f.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(__file__))
    main()
