"""Two processes with one cache directory, and one whose umask is open: every read is whole, and
nothing is anyone else's to write.
"""

import os
import stat
import subprocess
import sys
import textwrap

WORK = """
    import logging, os, sys
    import torch
    from hopper_mxfp4 import GPT_OSS, LayerShape, SwiGLU, allocate_weights, prepare_experts
    from hopper_mxfp4.tuning import tables as tactics

    seen = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())
    logging.getLogger("hopper_mxfp4").addHandler(handler)
    mine, rounds = int(sys.argv[1]), int(sys.argv[2])
    build = tactics.Build("a GPU", "0.7.2", "none", (10, 10))
    reads = 0
    for r in range(rounds):
        # One file that both write, and one of each's own, of changing length.
        count = 1 + (r + mine) % 12
        buckets = tuple(tactics.Bucket(1 << n, (1, 12), 1.5, 2.5) for n in range(count))
        for experts in (8, 16 + mine):
            shape = tactics.TunedShape(experts, 2944, 2944, 4, True, "fused")
            assert tactics.save(tactics.Table(build, shape, buckets)) is not None, seen
        found = [t for t in tactics.tables() if t.build == build]
        assert {8, 16 + mine} <= {t.shape.experts for t in found}, found
        assert all(1 <= len(t.buckets) <= 12 for t in found)
        reads += len(found)
        w = allocate_weights(LayerShape(1, 64, 32), family=GPT_OSS, device="cpu")
        prepare_experts(w, family=GPT_OSS, swiglu=SwiGLU())
    assert not seen, seen
    print(reads)
"""


def start(folder, number: int, rounds: int) -> subprocess.Popen:
    command = [sys.executable, "-c", textwrap.dedent(WORK), str(number), str(rounds)]
    environment = os.environ | {"HOPPER_MXFP4_CACHE_DIR": str(folder)}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def test_two_processes_prepare_and_tune_with_one_cache(tmp_path, record_property) -> None:
    """Both write one file over and over while both read all: never a part of one, a warning or a
    file left behind.
    """
    rounds = 150
    workers = [start(tmp_path, n, rounds) for n in (0, 1)]
    ended = [worker.communicate(timeout=300) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], ended
    reads = sum(int(out) for out, _ in ended)
    record_property("times", 2 * rounds)
    record_property("tables_read", reads)
    assert reads >= 2 * rounds * 2
    assert sorted(p.suffix for p in tmp_path.rglob("*") if p.is_file()) == [".json"] * 3


def test_the_cache_is_the_users_alone(tmp_path, record_property) -> None:
    """Folders and files, whatever the umask."""
    before = os.umask(0)
    try:
        worker = start(tmp_path / "not" / "there yet", 0, 1)
    finally:
        os.umask(before)
    out, error = worker.communicate(timeout=300)
    assert worker.returncode == 0, out + error
    made = {
        p.relative_to(tmp_path).as_posix(): stat.S_IMODE(p.stat().st_mode)
        for p in tmp_path.rglob("*")
    }
    record_property("modes", ", ".join(sorted({oct(mode) for mode in made.values()})))
    assert len(made) == 5
    assert not {path: oct(mode) for path, mode in made.items() if mode & 0o077}
