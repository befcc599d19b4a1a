"""Tactic tables: which one serves a shape, which pair a number of tokens, and what a bad cache does
(nothing).
"""

import json
import logging
import os
from dataclasses import replace
from types import SimpleNamespace

import pytest

from hopper_mxfp4.tuning import tables as tactics
from hopper_mxfp4.tuning.cards import CARDS, card_of
from hopper_mxfp4.tuning.tables import (
    DEFAULT,
    UNKNOWN,
    Bucket,
    Build,
    Table,
    TunedShape,
    choose,
    read,
    save,
    schedule,
    write,
)

BUILD = Build("NVIDIA H100 80GB HBM3", "0.7.2", "0123456789abcdef", (116, 116))
SHAPE = TunedShape(32, 2944, 2944, 4, True, "separate")
BUCKETS = (
    Bucket(1, (3, 120), 60.0, 70.0),
    Bucket(16, (5, 130), 200.0, 300.0),
    Bucket(1024, (70, 190), 700.0, 2000.0),
)
TABLE = Table(BUILD, SHAPE, BUCKETS, (5, 120))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of this test's own; what the package ships is out of the way."""
    monkeypatch.setenv("HOPPER_MXFP4_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tactics, "_shipped_files", list)
    tactics.tables.cache_clear()
    yield tmp_path / "tactics"
    tactics.tables.cache_clear()


def anything(gemm, tactic):
    return True


@pytest.mark.parametrize(
    ("tokens", "pair"),
    [
        (1, (3, 120)),
        (4, (3, 120)),
        (5, (5, 130)),
        (16, (5, 130)),
        (127, (5, 130)),
        (129, (70, 190)),
        (9999, (70, 190)),
    ],
)
def test_the_nearest_bucket(tokens, pair):
    """Nearest by ratio: the edges are the geometric means, 4 and 128."""
    assert schedule(TABLE, SHAPE, anything).pair(tokens) == pair


def test_another_number_of_experts_means_other_tokens():
    """What counts is tokens an expert: with four times the experts a bucket stands for four times
    the tokens.
    """
    wide = schedule(TABLE, replace(SHAPE, experts=128), anything)
    assert [wide.pair(m) for m in (16, 17, 512, 513)] == [(3, 120), (5, 130), (5, 130), (70, 190)]
    more = schedule(TABLE, replace(SHAPE, top_k=8), anything)
    assert [more.pair(m) for m in (2, 3, 64, 65)] == [(3, 120), (5, 130), (5, 130), (70, 190)]


def test_a_tactic_that_does_not_fit_becomes_the_default():
    made = schedule(
        TABLE,
        replace(SHAPE, intermediate=384),
        lambda gemm, tactic: (gemm, tactic) not in {(1, 5), (2, 190)},
    )
    assert made.pairs == [(3, 120), (DEFAULT, 130), (70, DEFAULT)]


def test_one_pair_for_all():
    assert schedule(TABLE, SHAPE, anything, fixed=True) == ([], [(5, 120)])
    unmeasured = replace(TABLE, fixed=None)
    assert {schedule(unmeasured, SHAPE, anything, fixed=True).pair(m) for m in (1, 16, 8192)} == {
        (70, 190)
    }, "the bucket nearest 256"


def test_choice(cache):
    """This GPU before another, then the nearest shape, then this module."""
    other_gpu = replace(TABLE, build=replace(BUILD, gpu="NVIDIA H200"))
    other_module = replace(TABLE, build=replace(BUILD, module="f" * 16))
    shard = replace(TABLE, shape=replace(SHAPE, intermediate=1536))
    big = replace(TABLE, shape=replace(SHAPE, experts=128))
    for table in (other_gpu, other_module, shard, big):
        save(table)
    table, where = choose(SHAPE, BUILD)
    assert (table.build, table.shape) == (other_module.build, SHAPE)
    assert "for this shape on this kind of GPU with another build" in where
    save(TABLE)
    table, where = choose(SHAPE, BUILD)
    assert (table.build, table.shape, table.buckets, table.fixed) == (
        BUILD,
        SHAPE,
        BUCKETS,
        (5, 120),
    )
    assert "another" not in where
    table, where = choose(replace(SHAPE, intermediate=1024), BUILD)
    assert table.shape == shard.shape
    assert "32 experts top-4 2944x1536 bias separate, the nearest shape" in where
    assert choose(replace(SHAPE, experts=64, bias=False), BUILD)[0] is not None
    table, where = choose(SHAPE, replace(BUILD, gpu="NVIDIA H20"))
    assert table.shape == SHAPE
    assert "another GPU, NVIDIA H" in where


@pytest.mark.parametrize(
    ("shape", "build"),
    [
        (SHAPE, replace(BUILD, counts=(116, 118))),
        (SHAPE, replace(BUILD, flashinfer="0.7.3", counts=(120, 120))),
        (SHAPE, replace(BUILD, flashinfer="0.7.3", counts=UNKNOWN)),
        (replace(SHAPE, finalize="fused"), BUILD),
        (replace(SHAPE, hidden=7168), BUILD),
        (replace(SHAPE, intermediate=512), BUILD),
    ],
    ids=[
        "other tactics",
        "another FlashInfer with other tactics",
        "another FlashInfer that does not tell",
        "another finalize",
        "hidden far off",
        "intermediate far off",
    ],
)
def test_no_choice(cache, shape, build):
    """A number that may well mean another kernel is never used."""
    save(TABLE)
    table, where = choose(shape, build)
    assert table is None
    assert "no table" in where


def test_another_flashinfer_with_as_many_tactics(cache):
    """It is taken, and said, where there is none of this version, be that of another GPU."""
    newer = replace(BUILD, flashinfer="0.7.3")
    save(TABLE)
    table, where = choose(SHAPE, newer)
    assert table.build == BUILD
    assert (
        "for this shape on this kind of GPU with another FlashInfer, 0.7.2 of as many tactics ("
        in where
    )
    save(replace(TABLE, build=replace(newer, gpu="NVIDIA H20")))
    table, where = choose(SHAPE, newer)
    assert table.build.flashinfer == "0.7.3"
    assert "another FlashInfer" not in where


def on(gpu, **changes):
    return replace(TABLE, build=replace(BUILD, gpu=gpu), **changes)


@pytest.mark.parametrize(
    ("gpu", "nearest"),
    [
        ("NVIDIA H100 80GB HBM3", "NVIDIA H100 80GB HBM3"),
        ("NVIDIA H800", "NVIDIA H100 80GB HBM3"),
        ("NVIDIA H200", "NVIDIA H200"),
        ("NVIDIA GH200 144G HBM3e", "NVIDIA H200"),
        ("NVIDIA H200 NVL", "NVIDIA H200"),
        ("NVIDIA H20-3e", "NVIDIA H20"),
        ("NVIDIA H20", "NVIDIA H20"),
        ("NVIDIA GH200 120GB", "NVIDIA GH200 480GB"),
        ("NVIDIA H100 PCIe", "NVIDIA H100 80GB HBM3"),
    ],
)
def test_the_nearest_card(cache, gpu, nearest):
    for there in ("NVIDIA H20", "NVIDIA GH200 480GB", "NVIDIA H200", "NVIDIA H100 80GB HBM3"):
        save(on(there))
    table, where = choose(SHAPE, replace(BUILD, gpu=gpu))
    assert table.build.gpu == nearest
    if gpu == nearest:
        assert "on this kind of GPU (" in where
    else:
        assert f"for this shape on another GPU, {nearest}, the nearest to this one (" in where


@pytest.mark.parametrize(
    ("here", "there"), [("Another", BUILD.gpu), ("NVIDIA H200", "Another"), ("Another", "Third")]
)
def test_an_unknown_card_gives_and_takes_tactics_and_says_so(cache, here, there):
    save(on(there))
    table, where = choose(SHAPE, replace(BUILD, gpu=here))
    assert table.build.gpu == there
    assert f"on another GPU, {there}, which this one can't be compared with (" in where


def properties(count, clock=1980000, memory=2619000, bits=5120):
    return SimpleNamespace(
        multi_processor_count=count,
        clock_rate=clock,
        memory_clock_rate=memory,
        memory_bus_width=bits,
    )


def test_cards_by_name_and_by_properties():
    for name in ("H100 80GB HBM3", "H100 PCIe", "H100 NVL", "H200", "GH200 480GB", "H20", "H20-3e"):
        word = name.removesuffix(" 80GB HBM3").removesuffix(" 480GB")
        assert card_of(f"NVIDIA {name}") == CARDS[word]
    assert card_of("NVIDIA A100-SXM4-80GB") is card_of("cpu") is card_of("NVIDIA H2000") is None
    assert card_of("NVIDIA H100 80GB HBM3", properties(132)) == CARDS["H100"]
    unknown = card_of("NVIDIA H99", properties(132))
    assert unknown == pytest.approx(CARDS["H100"], rel=0.01), "3.35 TB/s and 66.9 TFLOP/s"
    assert card_of("NVIDIA H99", properties(132, memory=0)) is None
    assert card_of("NVIDIA H99", SimpleNamespace(multi_processor_count=132)) is None
    half = card_of("NVIDIA H100 80GB HBM3 MIG 3g.40gb", properties(66))
    assert half[:3] == tuple(x / 2 for x in CARDS["H100"][:3])
    fewer = card_of("NVIDIA H100 80GB HBM3", properties(66))
    assert fewer[:2] == (CARDS["H100"].bandwidth, CARDS["H100"].instructions / 2)


def test_a_card_given_is_believed_before_its_name(cache):
    """A part of a card, whose name is a whole one's."""
    for there in ("NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe"):
        save(on(there))
    build = replace(BUILD, gpu="NVIDIA H100 80GB HBM3 MIG 4g.40gb")
    assert choose(SHAPE, build)[0].build.gpu == "NVIDIA H100 80GB HBM3"
    slow = CARDS["H100"]._replace(bandwidth=1.7, instructions=45.0, matmul=600.0)
    assert choose(SHAPE, build, slow)[0].build.gpu == "NVIDIA H100 PCIe"


def test_every_order_of_files_gives_the_same_choice(cache):
    """Ranks read one directory, whose order a file system may choose."""
    for e in (16, 64):
        save(replace(TABLE, shape=replace(SHAPE, experts=e)))
    chosen = choose(SHAPE, BUILD)[0]
    names = sorted(cache.iterdir())
    for path in reversed(names):
        os.utime(path)
    tactics.tables.cache_clear()
    assert choose(SHAPE, BUILD)[0] == chosen


def test_the_cache_is_private_and_whole(cache):
    path = save(TABLE)
    assert path.parent == cache
    assert cache.stat().st_mode & 0o777 == 0o700
    assert path.stat().st_mode & 0o077 == 0
    assert [p.name for p in cache.iterdir()] == [path.name], "no temporary file is left"
    assert read(path) == [replace(TABLE, source=str(path))]
    save(replace(TABLE, fixed=None))
    assert [t.fixed for t in tactics.tables()] == [None], "replaced, not added"


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "t.json"
    write(path, [TABLE])
    before = path.read_bytes()

    def full(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr("hopper_mxfp4.cache.os.replace", full)
    with pytest.raises(OSError, match="no space"):
        write(path, [replace(TABLE, fixed=None)])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def content(**changes):
    item = {
        "build": BUILD.__dict__,
        "shape": SHAPE.__dict__,
        "buckets": [b.__dict__ for b in BUCKETS],
        "fixed": [5, 120],
    }
    return json.dumps({"format": 1, "tables": [item | changes]})


BAD = {
    "empty": "",
    "truncated": content()[:-40],
    "not JSON": "\x80\x04pickle",
    "a list": "[1, 2]",
    "another format": content().replace('"format": 1', '"format": 2'),
    "no buckets": content(buckets=[]),
    "unsorted buckets": content(buckets=[b.__dict__ for b in BUCKETS[::-1]]),
    "tokens of text": content(buckets=[BUCKETS[0].__dict__ | {"tokens": "1"}]),
    "half a pair": content(buckets=[BUCKETS[0].__dict__ | {"pair": [3]}]),
    "a tactic beyond": content(buckets=[BUCKETS[0].__dict__ | {"pair": [116, 120]}]),
    "GEMM 1's for GEMM 2": content(buckets=[BUCKETS[0].__dict__ | {"pair": [3, 4]}]),
    "no number": content(fixed=[True, 120]),
    "a field too many": content(shape=SHAPE.__dict__ | {"colour": 1}),
    "a field missing": content(build={"gpu": "x"}),
    "no experts": content(shape=SHAPE.__dict__ | {"experts": 0}),
    "deep": "[" * 100_000,
    "no time": content(buckets=[BUCKETS[0].__dict__ | {"us": 0.0}]),
    "an endless time": content(buckets=[BUCKETS[0].__dict__ | {"us": float("inf")}]),
}


def test_the_good_one_is_good(tmp_path):
    """Guards the test below."""
    path = tmp_path / "good.json"
    path.write_text(content())
    assert read(path) == [replace(TABLE, source=str(path))]


def test_what_else_a_file_has_of_a_table_is_no_matter(tmp_path):
    """A user's cache may be of a release that kept more beside the tactics."""
    path = tmp_path / "more.json"
    path.write_text(content(smallbatch={"tokens": 70, "wide_from": 40, "revision": 3}))
    assert read(path) == [replace(TABLE, source=str(path))]
    write(path, read(path))
    assert "smallbatch" not in path.read_text()
    assert read(path) == [replace(TABLE, source=str(path))]


@pytest.mark.parametrize("text", BAD.values(), ids=BAD)
def test_a_bad_file_is_ignored_with_one_warning(cache, text, caplog):
    save(TABLE)
    (cache / "bad.json").write_bytes(text.encode("latin-1"))
    tactics.tables.cache_clear()
    for _ in range(3):
        assert choose(SHAPE, BUILD)[0] is not None, "the good file beside it counts"
    (warning,) = [
        record.getMessage() for record in caplog.records if record.levelno == logging.WARNING
    ]
    assert "bad.json" in warning


def test_a_directory_that_others_can_write_is_ignored(cache, caplog):
    save(TABLE)
    cache.chmod(0o770)
    tactics.tables.cache_clear()
    assert choose(SHAPE, BUILD)[0] is None
    assert save(TABLE) is None
    first, second = (record.getMessage() for record in caplog.records)
    assert "ignored" in first
    assert "chmod 700" in first
    assert "HOPPER_MXFP4_CACHE_DIR" in second


def test_an_unwritable_cache_costs_one_warning(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOPPER_MXFP4_CACHE_DIR", str(tmp_path / "file" / "below"))
    tactics.tables.cache_clear()
    assert save(TABLE) is None
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "can't be kept in the cache" in warning
    assert "HOPPER_MXFP4_CACHE_DIR" in warning
    assert isinstance(tactics.tables(), tuple)
    tactics.tables.cache_clear()


def test_several_shipped_files(cache, tmp_path, monkeypatch):
    """One a card, in one format: each GPU has its own, and a user's own comes first."""
    files = [tmp_path / "h100.json", tmp_path / "h200.json"]
    for path, gpu in zip(files, (BUILD.gpu, "NVIDIA H200"), strict=True):
        write(path, [on(gpu), on(gpu, shape=replace(SHAPE, experts=64))])
    monkeypatch.setattr(tactics, "_shipped_files", lambda: files)
    tactics.tables.cache_clear()
    for path, gpu in zip(files, (BUILD.gpu, "NVIDIA H200"), strict=True):
        assert choose(SHAPE, replace(BUILD, gpu=gpu))[0].source == str(path)
    mine = save(on("NVIDIA H200"))
    assert choose(SHAPE, replace(BUILD, gpu="NVIDIA H200"))[0].source == str(mine)


def test_what_the_package_ships_can_be_read():
    """And has what is read of it alone."""
    for path in tactics._shipped_files():
        assert read(path), path
        for item in json.loads(path.read_text())["tables"]:
            assert item.keys() == {"build", "shape", "buckets", "fixed"}, path
