"""A MoE layer by the wide kernel: compiles it, prepares weights, launches.

Needs torch, nvcc and a Hopper GPU.
"""

import ctypes
import hashlib
import os
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from layout import pack, pack_bias, rows_of_gated, rows_of_plain
from wgmma import wrappers

HERE = Path(__file__).parent
CACHE = Path(os.environ.get("WIDE_CACHE", tempfile.gettempdir() + "/wide-cubins"))
SHARED_LIMIT = 232448
BLOCK_BYTES = 2176


@dataclass(frozen=True)
class Config:
    """How a GEMM is cut; wide.cu says what each is."""

    nwg: int = 3
    wm: int = 1
    nmax: int = 192
    nstep: int = 8
    nmin: int = 16
    stages: int = 8
    consumer_regs: int = 160
    producer_regs: int = 32
    nibbles: int = 0
    run: int = 4
    every_lane: int = 0
    stagger: int = 2000

    @property
    def widths(self) -> list[int]:
        return list(range(self.nmin, self.nmax + 1, self.nstep))

    @property
    def threads(self) -> int:
        return 128 * (self.nwg + 1)

    def shared_bytes(self, experts: int) -> int:
        stage = self.nmax * 128 + self.nwg * self.wm * BLOCK_BYTES + 16
        return self.stages * stage + 64 + 16 * (experts + 1)

    def fitted(self, experts: int) -> "Config":
        """With as many stages as shared memory holds."""
        n = 12
        while replace(self, stages=n).shared_bytes(experts) > SHARED_LIMIT:
            n -= 1
        return replace(self, stages=n)


CONFIGS = {  # warpgroups x blocks of 64 rows each x tokens; the first two read the same weights
    "3x1x192": Config(),
    "3x1x96": Config(nmax=96),
    "2x2x128": Config(nwg=2, wm=2, nmax=128, consumer_regs=232, producer_regs=40),
    "4x1x96": Config(nwg=4, nmax=96, consumer_regs=112),
}


def compile_cubin(source: str, macros: dict[str, int]) -> tuple[bytes, str]:
    """The cubin and what ptxas says of it."""
    text = "".join(f"#define {k} {v}\n" for k, v in macros.items())
    for part in ("ptx.cuh", "decode.cuh", "schedule.cuh", source):
        if part == "schedule.cuh" and source == "wide.cu":
            step, low, high = macros["NSTEP"], macros["NMIN"], macros["NMAX"]
            text += wrappers(list(range(low, high + 1, step)))
        text += (HERE / part).read_text()
    CACHE.mkdir(exist_ok=True)
    path = CACHE / f"{Path(source).stem}-{hashlib.sha256(text.encode()).hexdigest()[:24]}"
    cubin, log = path.with_suffix(".cubin"), path.with_suffix(".log")
    if not log.exists():
        path.with_suffix(".cu").write_text(text)
        command = ["nvcc", "-cubin", "-gencode=arch=compute_90a,code=sm_90a", "-std=c++17", "-O3"]
        command += ["-lineinfo", "-Xptxas", "-v", "-o", str(cubin), str(path.with_suffix(".cu"))]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)
        log.write_text(done.stderr)
    return cubin.read_bytes(), log.read_text()


def layer_macros(config, hidden, inter, experts, top_k) -> list[tuple[str, dict[str, int]]]:
    """The two compilations of a layer: routing with the sum, and both GEMMs."""
    c = config.fitted(experts)
    panel, blocks1, blocks2 = c.nwg * c.wm, -(-inter // 32), -(-hidden // 64)
    common = {
        "E": experts,
        "NMAX": c.nmax,
        "NSTEP": c.nstep,
        "NMIN": c.nmin,
        "NIBBLES": c.nibbles,
        "PANELS1": -(-blocks1 // panel),
        "PANELS2": -(-blocks2 // panel),
    }
    gemm = {
        "K1": hidden,
        "BLOCKS1": blocks1,
        "K2": inter,
        "BLOCKS2": blocks2,
        "COLUMNS2": hidden,
        "NWG": c.nwg,
        "WM": c.wm,
        "STAGES": c.stages,
        "CONSUMER_REGS": c.consumer_regs,
        "PRODUCER_REGS": c.producer_regs,
        "RUN": c.run,
        "EVERY_LANE": c.every_lane,
        "STAGGER": c.stagger,
    }
    route = common | {"TOPK": top_k, "COLUMNS": hidden, "INTER": inter}
    return [("route.cu", route), ("wide.cu", common | gemm)]


class Structure:
    """Arguments of a kernel as a C struct, kept with what they point to."""

    def __init__(self, fields: dict):
        types = {int: ctypes.c_int, float: ctypes.c_float}
        made = []
        for name, value in fields.items():
            pointer = value is None or isinstance(value, torch.Tensor)
            long = name.endswith("_stride")
            made.append((name, ctypes.c_void_p if pointer or long else types[type(value)]))
        kind = type("Args", (ctypes.Structure,), {"_fields_": made})
        plain = (v.data_ptr() if isinstance(v, torch.Tensor) else v for v in fields.values())
        self.value, self.keep = kind(*plain), fields
        self.pointers = (ctypes.c_void_p * 1)(ctypes.addressof(self.value))


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 16)]


class _LaunchConfig(ctypes.Structure):
    _fields_ = [
        ("dimensions", ctypes.c_uint * 6),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    ]


class Driver:
    def __init__(self):
        torch.zeros(1, device="cuda")
        self.lib = ctypes.CDLL("libcuda.so.1")
        self.modules = []

    def check(self, code: int, what: str) -> None:
        if code:
            text = ctypes.c_char_p()
            self.lib.cuGetErrorString(code, ctypes.byref(text))
            raise RuntimeError(f"{what}: {text.value}")

    def functions(self, cubin: bytes, names: list[str], shared: int = 0) -> list[ctypes.c_void_p]:
        module = ctypes.c_void_p()
        self.check(self.lib.cuModuleLoadData(ctypes.byref(module), cubin), "cuModuleLoadData")
        self.modules.append(module)
        found = []
        for name in names:
            f = ctypes.c_void_p()
            code = self.lib.cuModuleGetFunction(ctypes.byref(f), module, name.encode())
            self.check(code, name)
            if shared:  # 8: the attribute for the most dynamic shared memory
                self.check(self.lib.cuFuncSetAttribute(f, 8, shared), "cuFuncSetAttribute")
            found.append(f)
        return found

    def launch(self, f, grid: int, threads: int, shared: int, args: Structure, early: bool = True):
        """early: it may begin before the kernel before it ends; it waits itself where it has to."""
        attribute = _Attribute(6, 0)  # programmatic stream serialization
        attribute.value[0] = 1
        config = _LaunchConfig()
        config.dimensions[:] = [grid, 1, 1, threads, 1, 1]
        config.shared, config.stream = shared, torch.cuda.current_stream().cuda_stream
        config.attributes, config.count = ctypes.pointer(attribute), int(early)
        code = self.lib.cuLaunchKernelEx(ctypes.byref(config), f, args.pointers, None)
        self.check(code, "cuLaunchKernelEx")


class WideLayer:
    """w13: [E, 2 I, H/2] bytes, gate rows first; s13: [E, 2 I, H/32]; b13: [E, 2 I] or None.

    w2, s2, b2: the same of [E, H, I].
    """

    def __init__(self, config, w13, s13, b13, w2, s2, b2, top_k, swiglu=(1.702, 1.0, 7.0)):
        self.config, self.top_k, self.swiglu = config, top_k, swiglu
        self.experts, self.hidden, self.inter = w13.shape[0], w13.shape[2] * 2, w2.shape[2] * 2
        rows = rows_of_gated(self.inter), rows_of_plain(self.hidden)
        self.w13 = pack(w13, s13, rows[0], config.nwg * config.wm, bool(config.nibbles))
        self.w2 = pack(w2, s2, rows[1], config.nwg * config.wm, bool(config.nibbles))
        self.b13 = None if b13 is None else pack_bias(b13, rows[0])
        self.b2 = None if b2 is None else pack_bias(b2, rows[1])
        self.driver = Driver()
        self.sms = torch.cuda.get_device_properties(0).multi_processor_count
        self.build()

    def build(self) -> None:
        macros = layer_macros(self.config, self.hidden, self.inter, self.experts, self.top_k)
        with ThreadPoolExecutor(2) as pool:
            built = list(pool.map(lambda m: compile_cubin(*m)[0], macros))
        self.shared = self.config.fitted(self.experts).shared_bytes(self.experts)
        names = ["route_count", "route_place", "route_tokens", "route_sum"]
        self.route = self.driver.functions(built[0], names)
        (self.gemm,) = self.driver.functions(built[1], ["wide_gemm"], self.shared)

    def buffers(self, tokens: int) -> dict[str, torch.Tensor]:
        pairs, c = tokens * self.top_k, self.config
        tiles = min(pairs, self.experts + pairs // c.nmax)
        rows = pairs + tiles * max(c.nstep, c.nmin)

        def new(*shape, dtype=torch.int32):
            return torch.empty(shape, dtype=dtype, device="cuda")

        def padded(columns):
            return new(rows, -(-columns // 64) * 64, dtype=torch.bfloat16)

        return {
            "counts": new(-(-pairs // 1024), self.experts),
            "place": new(pairs),
            "experts": new(self.experts, 4),
            "slots": new(self.experts + 1, 4),
            "ready": new(1 + tiles),
            "tokens": padded(self.hidden),
            "h": padded(self.inter),
            "rows": new(rows, self.hidden, dtype=torch.bfloat16),
            "out": new(tokens, self.hidden, dtype=torch.bfloat16),
        }

    def plan(self, x, ids, topw, b=None):
        """The launches of a call, by name, and the output they write."""
        b = b or self.buffers(len(x))
        pairs = ids.numel()
        alpha, beta, limit = self.swiglu
        names = "counts", "place", "experts", "slots", "ready"
        limits = {"pairs": pairs, "token_tiles": len(b["ready"]) - 1}
        route = Structure({"ids": ids} | {n: b[n] for n in names} | limits)
        names = "place", "experts", "tokens", "h"
        tokens = Structure(
            {"x": x, "ids": ids} | {n: b[n] for n in names} | {"x_stride": x.stride(0)}
        )
        gemm = Structure(
            {
                "w13": self.w13,
                "b13": self.b13,
                "x": b["tokens"],
                "h": b["h"],
                "w2": self.w2,
                "b2": self.b2,
                "h_in": b["h"],
                "rows": b["rows"],
                "slots": b["slots"],
                "ready": b["ready"],
                "alpha": alpha,
                "beta": beta,
                "limit": limit,
            }
        )
        total = Structure(
            {
                "rows": b["rows"],
                "place": b["place"],
                "topw": topw,
                "out": b["out"],
                "tokens": len(x),
            }
        )
        blocks, threads = -(-pairs // 1024), self.config.threads
        sums = -(-len(x) * (self.hidden // 8) // 256)
        go = self.driver.launch
        return {
            "count": lambda: go(self.route[0], blocks, 1024, 0, route, early=False),
            "place": lambda: go(self.route[1], blocks, 1024, 0, route),
            "tokens": lambda: go(self.route[2], len(x), 128, 0, tokens),
            "gemm": lambda: go(self.gemm, self.sms, threads, self.shared, gemm),
            "sum": lambda: go(self.route[3], sums, 256, 0, total),
        }, b["out"]
