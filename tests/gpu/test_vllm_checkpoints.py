"""Layers of checkpoints by whatever tool, in vLLM on a Hopper GPU, beside vLLM's own kernel."""

import pytest

from hopper_mxfp4 import env
from moe_checkpoints import (
    EXPERTS,
    HIDDEN,
    MIMO,
    TOP_K,
    auto_round,
    compressed_tensors,
    expert_tensors,
    quark,
    reference,
    relative_l2,
    write,
)

pytest.importorskip("vllm", reason="vLLM is not installed")

FORMATS = {
    "compressed-tensors": compressed_tensors(),
    "quark": quark(),
    "auto-round": auto_round(),
    "mimo": MIMO,
}
# What stock vLLM is told to run. For Quark it takes the first backend of GPT-OSS's that its config
# allows, and FlashInfer's wants that model's biases and rows, whatever the layer's size.
STOCK = {"quark": {"moe_backend": "marlin"}}


@pytest.mark.parametrize("name", FORMATS)
def test_it_computes_what_stock_vllm_does(tmp_path, monkeypatch, record_property, name):
    from hopper_mxfp4_vllm.layer import PreparedMoEMethod
    from layers import random_call
    from models import DEVICE, Rank, configure, plain_moe, prepared, run

    how = FORMATS[name]
    write(tmp_path, how)
    tensors = expert_tensors(how)
    for mode, options in (("on", {}), ("off", STOCK.get(name, {}))):
        monkeypatch.setenv(env.MODE.name, mode)
        rank = Rank(configure(tmp_path, None, **options))
        on_gpu = {name: t.to(DEVICE) for name, t in tensors.items()}
        experts = prepared(rank, plain_moe(rank), on_gpu)
        assert isinstance(experts.quant_method, PreparedMoEMethod) is (mode == "on")
        for m in (1, 16, 256):
            x, ids, topk_weights = random_call(m, HIDDEN, EXPERTS, TOP_K, 0)
            y = run(rank, experts, x, ids, topk_weights).cpu()
            wanted = reference(how, tensors, tuple(t.cpu() for t in (x, ids, topk_weights)))
            error = relative_l2(y, wanted)
            record_property(f"relative_l2_{mode}_at_{m}", error)
            assert error < (5e-3 if mode == "on" else 1e-2)  # stock rounds in its own way
