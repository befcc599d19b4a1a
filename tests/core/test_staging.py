"""What the flashinfer kernel is handed of a call: repeats made one, masked ids, padding; and what
our kernel's launch is given.
"""

import ctypes
import math
import re
import struct

import pytest
import torch

from hopper_mxfp4 import LayerShape
from hopper_mxfp4.kernels.flashinfer import staging
from hopper_mxfp4.kernels.flashinfer.kernel import FlashInferKernel
from hopper_mxfp4.kernels.jit import driver, nvrtc


def by_hand(
    ids: list[list[int]], weights: list[list[float]], experts: int
) -> tuple[list[list[int]], list[list[float]]]:
    """Row by row, with Python's dict."""
    all_ids, all_weights = [], []
    for row, factors in zip(ids, weights, strict=True):
        sums: dict[int, float] = {}
        for e, weight in zip(row, factors, strict=True):
            sums[e] = sums.get(e, 0.0) + weight
        seen: set[int] = set()
        new_ids, new_weights = [], []
        for e in row:
            first = 0 <= e < experts and e not in seen
            seen.add(e)
            new_ids.append(e if first else -1)
            new_weights.append(sums[e] if first else 0.0)
        all_ids.append(new_ids)
        all_weights.append(new_weights)
    return all_ids, all_weights


def targets(m: int, top_k: int, padded: int | None):
    x = None if padded is None else torch.full((m, padded), math.nan, dtype=torch.bfloat16)
    return staging.staged(
        x, torch.full((m, top_k), -7, dtype=torch.int32), torch.full((m, top_k), math.nan)
    )


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("top_k", [1, 2, 4, 9])
def test_repeats_and_masked_ids(top_k, ids_dtype) -> None:
    g = torch.Generator().manual_seed(top_k)
    ids = torch.randint(-2, 7, (40, top_k), generator=g, dtype=ids_dtype)
    if ids_dtype is torch.int64:
        ids[0, 0], ids[1, 0] = (1 << 32) + 1, -(1 << 40)
    weights = torch.randint(1, 64, (40, top_k), generator=g) / 64.0  # whose sums are exact
    wanted = by_hand(ids.tolist(), weights.tolist(), 5)
    repeats = sum(
        new == -1 and 0 <= old < 5
        for row in zip(wanted[0], ids.tolist(), strict=True)
        for new, old in zip(*row, strict=True)
    )
    assert (repeats > 0) == (top_k > 1)
    for strided in (ids, ids.t().contiguous().t()):
        to = targets(40, top_k, None)
        staging.by_torch(torch.zeros(40, 32, dtype=torch.bfloat16), strided, weights, 5, to)
        assert (to.ids.tolist(), to.weights.tolist()) == wanted


def test_a_masked_ids_weight_is_never_read() -> None:
    ids = torch.tensor([[0, -1, 3], [9, 9, 1]], dtype=torch.int32)
    weights = torch.tensor([[0.5, math.nan, 0.25], [math.nan, math.inf, 2.0]])
    to = targets(2, 3, None)
    staging.by_torch(torch.zeros(2, 32, dtype=torch.bfloat16), ids, weights, 4, to)
    assert to.ids.tolist() == [[0, -1, 3], [-1, -1, 1]]
    assert to.weights.tolist() == [[0.5, 0.0, 0.25], [0.0, 0.0, 2.0]]


def test_padding() -> None:
    x = torch.randn(3, 96).bfloat16()
    to = targets(3, 1, 128)
    staging.by_torch(x, torch.zeros(3, 1, dtype=torch.int32), torch.ones(3, 1), 1, to)
    assert torch.equal(to.x[:, :96], x)
    assert not to.x[:, 96:].any()


@pytest.mark.parametrize(
    ("m", "top_k", "padded", "blocks"),
    [(1, 4, 2944, 2), (1, 6, None, 1), (500, 6, None, 12), (16_384, 4, 2944, staging.BLOCKS)],
)
def test_what_is_launched(m, top_k, padded, blocks, monkeypatch) -> None:
    """Every address, stride and size, and as many blocks as there is work for."""
    launched = []

    def launch(config, function, parameters):
        launched.append(
            (
                config,
                function,
                ctypes.string_at(
                    ctypes.c_void_p.from_address(parameters).value, staging._ARGS.size
                ),
            )
        )

    monkeypatch.setattr(staging, "_config", staging._config.__wrapped__)
    monkeypatch.setattr(staging, "raw_stream", lambda index: 77)
    monkeypatch.setattr(driver, "launch_config", lambda *given, **more: (given, more))
    monkeypatch.setattr(driver, "launch", launch)
    hidden = 2880
    x = torch.empty(m, hidden + 8, dtype=torch.bfloat16)[:, :hidden]
    ids, weights = torch.zeros(top_k, m, dtype=torch.int64).t(), torch.ones(m, 2 * top_k)[:, ::2]
    to = targets(m, top_k, padded)
    staging.by_launch("function", x, ids, weights, 32, to)
    ((config, function, arguments),) = launched
    assert function == "function"
    assert config == (((blocks, 1), 256, 0, 77), {"early": False})
    given = staging._ARGS.unpack(arguments)
    places = (
        x.data_ptr(),
        ids.data_ptr(),
        weights.data_ptr(),
        to.x.data_ptr() if padded else 0,
        to.ids.data_ptr(),
        to.weights.data_ptr(),
    )
    assert given[:6] == places
    assert given[6:12] == (hidden + 8, 1, 1, m, 2 * top_k, 2)
    assert given[12:] == (m, top_k, 32, 360, (padded or 0) // 8, x.data_ptr() % 16 == 0, 1)


def test_the_arguments_are_the_sources() -> None:
    """As many of each type, in the order of staging.cu, and the names in the order in which they
    are packed.
    """
    source = staging.source().text
    workload = source[source.index("struct Args {") + 13 : source.index("};")]
    kinds, names = "", []
    for line in workload.splitlines():
        if found := re.match(r"\s*(const )?(\w+( long)?)(\*?) ([\w, ]+);", line):
            _, kind, _, pointer, declared = found.groups()
            some = declared.split(", ")
            kinds += ("P" if pointer else {"long long": "q", "int": "i"}[kind]) * len(some)
            names += some
    assert kinds == "P" * 6 + "q" * 6 + "i" * 7
    assert struct.calcsize("@" + kinds) == staging._ARGS.size
    tensors = "x ids topw x_to ids_to topw_to x_s0 x_s1 ids_s0 ids_s1 topw_s0 topw_s1"
    sizes = "tokens top_k experts columns padded aligned ids_are_int64"
    assert names == [*tensors.split(), *sizes.split()]


def test_it_is_compiled_ahead(monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(nvrtc, "problem", lambda: None)
    monkeypatch.setattr(nvrtc, "compile_cubin", lambda *what: asked.append(what) or b"")
    monkeypatch.setattr(driver, "load", lambda *_: [7])
    (compilation,) = FlashInferKernel().compilations(LayerShape(8, 160, 96))
    compilation.run()
    assert staging.load.__wrapped__(0) == 7
    assert asked == [(staging.source(), {})] * 2


def test_it_compiles() -> None:
    if reason := nvrtc.problem():
        pytest.skip(reason)
    assert b"stage" in staging.compile_kernel()
