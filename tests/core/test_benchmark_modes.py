"""What the SGLang rig starts, without starting it: layouts, places, ports, references."""

import sys
from pathlib import Path

import pytest

RIG = Path(__file__).resolve().parents[2] / "benchmarks" / "engines" / "sglang"


@pytest.fixture(scope="module")
def rig():
    sys.path.insert(0, str(RIG))
    try:
        import modes
        import servers
    finally:
        sys.path.remove(str(RIG))
    return modes, servers


def test_modes_are_dealt_out_over_the_gpus(rig) -> None:
    modes, _ = rig
    names = ["stock", "stock_tp2", "ours", "ours_tp2", "ours_ep2"]
    assert modes.place(names, 4) == {
        "stock": [0],
        "stock_tp2": [0, 1],
        "ours": [1],
        "ours_tp2": [2, 3],
        "ours_ep2": [0, 1],
    }
    assert modes.place(["stock", "ours"], 1) == {"stock": [0], "ours": [0]}
    with pytest.raises(ValueError, match="needs 2 GPUs, and there are 1"):
        modes.place(names, 1)
    with pytest.raises(ValueError, match="no mode 'theirs'"):
        modes.place(["theirs"], 1)


@pytest.mark.parametrize(
    ("name", "held_against"),
    [
        ("stock", []),
        ("ours", ["stock"]),
        ("ours_flag", ["ours", "stock"]),
        ("triton", ["stock"]),
        ("stock_tp2", ["stock"]),
        ("ours_tp2", ["ours", "stock_tp2"]),
        ("ours_tp2_graphs", ["ours", "stock_tp2"]),
        ("mixed_pd", ["stock"]),
    ],
)
def test_what_a_modes_tokens_are_held_against(rig, name, held_against) -> None:
    """Its own backend on one GPU and stock laid out alike, of what was run."""
    run = {"stock", "ours", "triton", "stock_tp2", "ours_tp2"}
    assert rig[0].references(name, run) == held_against


def test_every_mode_names_a_backend_that_runs_alone(rig) -> None:
    modes, _ = rig
    for name in modes.MODES:
        assert name.partition("_")[0] in {*modes.MODES, "mixed"}


@pytest.fixture
def started(rig, tmp_path, monkeypatch):
    """start() without processes: what would have been."""
    modes, servers = rig
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    made = []

    def note(command, log, env, port, ready=None):
        made.append((command, log.name, env, port))
        return made[-1]

    monkeypatch.setattr(servers, "Process", note)

    def run(name, gpus, number=0):
        made.clear()
        servers.start(name, modes.MODES[name], gpus, number, tmp_path)
        return list(made)

    return run


def test_a_server_on_two_gpus(started) -> None:
    (command, log, env, port) = started("ours_tp2", [2, 3], 1)[0]
    assert command[0] == "sglang.launch_server"
    assert command[command.index("--tp-size") + 1] == "2"
    assert command[command.index("--port") + 1] == str(port) == "10900"
    assert log == "ours_tp2.log"
    assert env["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert env["HOPPER_MXFP4"] == "on"
    assert env["NCCL_NVLS_ENABLE"] == "0"


def test_a_prefill_and_a_decode_server_behind_a_router(started) -> None:
    """Each with its own variables and GPU; the router knows both and the bootstrap port."""
    prefill, decode, router = started("mixed_pd", [0, 1])
    assert "HOPPER_MXFP4" not in prefill[2]
    assert decode[2]["HOPPER_MXFP4"] == "on"
    bootstrap = prefill[0][prefill[0].index("--disaggregation-bootstrap-port") + 1]
    assert decode[0][decode[0].index("--base-gpu-id") + 1] == "1"
    given = router[0][router[0].index("--prefill") + 1 :]
    assert given == [
        f"http://127.0.0.1:{prefill[3]}",
        bootstrap,
        "--decode",
        f"http://127.0.0.1:{decode[3]}",
    ]


def test_no_port_is_taken_twice(rig, started) -> None:
    """Nor one that SGLang derives from a server's: DP attention's are up to 246 above it."""
    modes, _ = rig
    taken: list[int] = []
    for number, (name, mode) in enumerate(modes.MODES.items()):
        for command, _, _, port in started(name, list(range(mode.gpus)), number):
            server = command[0] == "sglang.launch_server"
            taken += range(port, port + (247 if server else 2))
    assert len(taken) == len(set(taken))
    assert max(taken) < 32768, "below those that Linux hands out"


def test_a_mode_follows_the_devices_that_are_visible(started, monkeypatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert started("ours_tp2", [2, 3])[0][2]["CUDA_VISIBLE_DEVICES"] == "6,7"
