#!/usr/bin/env python3
"""Write a random checkpoint with DeepSeek-V4-Flash's names, dtypes and widths, and few layers.

    make_checkpoint.py DIR LAYERS [--ratios 0,0] [--hash 1] [--tiny]

FP8 (e4m3) linears with e8m0 scales per 128x128, FP4 experts as packed int8 with e8m0 scales per 32,
the rest BF16 or FP32: 6.6 GB for two layers, a few seconds. Ratios per layer: 0 (sliding window
only, as V4-Flash's own first two layers), 4, 128. The first --hash layers route by token id. The
vocabulary has 4096 entries; there is no tokenizer and no MTP layer.

Needs numpy and this package. The same arguments give the same bytes. --tiny is for a machine
without GPU.
"""

import argparse
import json
import math
import os
import time

import numpy as np

from hopper_mxfp4.checkpoint.deepseek_v4 import deepseek_v4_config

parser = argparse.ArgumentParser()
parser.add_argument("dir")
parser.add_argument("layers", type=int)
parser.add_argument("--ratios")
parser.add_argument("--hash", type=int, default=1)
parser.add_argument("--tiny", action="store_true")
args = parser.parse_args()
ratios = [int(r) for r in args.ratios.split(",")] if args.ratios else [0] * args.layers
assert len(ratios) == args.layers
assert args.hash <= args.layers
tiny = args.tiny
H, INTER, E, TOPK = (256, 128, 8, 6) if tiny else (4096, 2048, 256, 6)
HEADS, QLORA, OLORA = (8, 128, 128) if tiny else (64, 1024, 1024)
HEAD, ROPE, GROUPS = 512, 64, 8
IHEADS, IDIM, HC, VOCAB = 64, 128, 4, 4096
MIX = (2 + HC) * HC

rng = np.random.Generator(np.random.SFC64(0))
pool = rng.integers(0, 256, size=(8 if tiny else 256) << 20, dtype=np.uint8)
began = time.time()


def draw(n):
    """n random bytes, a slice of the pool: no copy."""
    start = int(rng.integers(0, len(pool) - n))
    return pool[start : start + n]


def normal(*shape, std=1.0):
    return rng.standard_normal(shape, dtype=np.float32) * np.float32(std)


def f32(x):
    return "F32", x.shape, np.ascontiguousarray(x, np.float32)


def bf16(x):
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return "BF16", x.shape, ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def e4m3_table():
    """A normal distribution of standard deviation 32: the e4m3 bytes of its 256 quantiles.

    None is NaN. Most are rounded down a little.
    """
    from statistics import NormalDist

    out = []
    for i in range(256):
        v = 32 * NormalDist().inv_cdf((i + 0.5) / 256)
        m, e = math.frexp(abs(v))
        e -= 1
        q = max(0, min(0x7E, ((e + 7) << 3) | int((2 * m - 1) * 8)))
        out.append(q | (0x80 if v < 0 else 0))
    return np.array(out, np.uint8)


TABLE = e4m3_table()


def fp8(rows, cols, gain=1.0):
    """A weight, of standard deviation about gain / sqrt(cols), and its scale."""
    e = round(math.log2(gain / math.sqrt(cols) / 32))
    scale = (127 + e + rng.integers(-1, 1, size=(-(-rows // 128), -(-cols // 128)))).astype(
        np.uint8
    )
    return {
        "weight": ("F8_E4M3", (rows, cols), TABLE[draw(rows * cols)]),
        "scale": ("F8_E8M0", scale.shape, scale),
    }


# 2**-9 to 2**-6: weights of about 0.017
SCALES = rng.integers(118, 122, size=8 << 20, dtype=np.uint8)


def fp4(rows, cols):
    n, start = rows * cols // 32, int(rng.integers(0, 4 << 20))
    return {
        "weight": ("I8", (rows, cols // 2), draw(rows * cols // 2)),
        "scale": ("F8_E8M0", (rows, cols // 32), SCALES[start : start + n]),
    }


def ones(n):
    return bf16(1 + normal(n, std=0.05))


def layer(i):
    t = {"attn_norm.weight": ones(H), "ffn_norm.weight": ones(H)}

    def put(name, parts):
        t.update({f"{name}.{k}": v for k, v in parts.items()})

    for part in ("attn", "ffn"):
        t[f"hc_{part}_fn"] = f32(normal(MIX, HC * H, std=1 / math.sqrt(HC * H)))
        t[f"hc_{part}_base"] = f32(normal(MIX, std=0.5))
        t[f"hc_{part}_scale"] = f32(np.full(3, 0.3))
    t["attn.attn_sink"] = f32(normal(HEADS))
    put("attn.wq_a", fp8(QLORA, H))
    put("attn.wkv", fp8(HEAD, H))
    t["attn.q_norm.weight"], t["attn.kv_norm.weight"] = ones(QLORA), ones(HEAD)
    put("attn.wq_b", fp8(HEADS * HEAD, QLORA))
    put("attn.wo_a", fp8(GROUPS * OLORA, HEADS * HEAD // GROUPS, 2.0))
    put("attn.wo_b", fp8(H, GROUPS * OLORA, 2.0))

    def compressor(name, dim, ratio):
        width = dim * (2 if ratio == 4 else 1)
        t[f"{name}.ape"] = f32(normal(ratio, width, std=0.1))
        t[f"{name}.wkv.weight"] = bf16(normal(width, H, std=1 / math.sqrt(H)))
        t[f"{name}.wgate.weight"] = bf16(normal(width, H, std=1 / math.sqrt(H)))
        t[f"{name}.norm.weight"] = ones(dim)

    if ratios[i]:
        compressor("attn.compressor", HEAD, ratios[i])
    if ratios[i] == 4:
        put("attn.indexer.wq_b", fp8(IHEADS * IDIM, QLORA))
        t["attn.indexer.weights_proj.weight"] = bf16(normal(IHEADS, H, std=1 / math.sqrt(H)))
        compressor("attn.indexer.compressor", IDIM, 4)
    t["ffn.gate.weight"] = bf16(normal(E, H, std=1 / math.sqrt(H)))
    if i < args.hash:
        choice = np.argsort(rng.random((VOCAB, E), dtype=np.float32), axis=1)[:, :TOPK].astype(
            np.int64
        )
        t["ffn.gate.tid2eid"] = "I64", choice.shape, np.ascontiguousarray(choice)
    else:
        t["ffn.gate.bias"] = f32(normal(E, std=0.1))
    for name, rows, cols in (("w1", INTER, H), ("w3", INTER, H), ("w2", H, INTER)):
        put(f"ffn.shared_experts.{name}", fp8(rows, cols))
        for e in range(E):
            put(f"ffn.experts.{e}.{name}", fp4(rows, cols))
    return {f"layers.{i}.{k}": v for k, v in t.items()}


index, total = {}, 0


def save(name, tensors):
    global total
    header, at = {}, 0
    for key, (dtype, shape, data) in tensors.items():
        header[key] = {
            "dtype": dtype,
            "shape": [int(s) for s in shape],
            "data_offsets": [at, at + data.nbytes],
        }
        at += data.nbytes
        index[key] = name
    head = json.dumps(header | {"__metadata__": {"format": "pt"}}).encode()
    head += b" " * (-len(head) % 8)
    with open(f"{args.dir}/{name}", "wb", buffering=0) as f:
        f.write(len(head).to_bytes(8, "little") + head)
        for _, _, data in tensors.values():
            view = memoryview(np.ascontiguousarray(data)).cast("B")
            while len(view):
                view = view[f.write(view) :]
    total += at


os.makedirs(args.dir, exist_ok=True)
shards = args.layers + 1
for i in range(args.layers):
    save(f"model-{i + 1:05}-of-{shards:05}.safetensors", layer(i))
save(
    f"model-{shards:05}-of-{shards:05}.safetensors",
    {
        "embed.weight": bf16(normal(VOCAB, H)),
        "head.weight": bf16(normal(VOCAB, H, std=3 / math.sqrt(H))),
        "norm.weight": ones(H),
        "hc_head_fn": f32(normal(HC, HC * H, std=1 / math.sqrt(HC * H))),
        "hc_head_base": f32(normal(HC, std=0.5)),
        "hc_head_scale": f32(np.full(1, 0.3)),
    },
)
with open(f"{args.dir}/model.safetensors.index.json", "w") as f:
    json.dump({"metadata": {"total_size": total}, "weight_map": index}, f)
config = deepseek_v4_config(
    layers=args.layers,
    hash_layers=args.hash,
    compress_ratios=ratios,
    hidden=H,
    intermediate=INTER,
    experts=E,
    heads=HEADS,
    query_rank=QLORA,
    output_rank=OLORA,
    vocabulary=VOCAB,
)
with open(f"{args.dir}/config.json", "w") as f:
    json.dump(config, f, indent=1)
print(f"{args.dir}: {total / 1e9:.2f} GB in {time.time() - began:.0f} s")
