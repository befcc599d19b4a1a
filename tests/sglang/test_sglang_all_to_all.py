"""Experts spread over ranks, behind SGLang's own DeepEP dispatchers.

DeepEP's buffers are stand-ins; each rank's layer is SGLang's, one after the other in this process.
"""

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers.dp_attention import set_is_extend_in_batch
from sglang.srt.layers.moe import utils
from sglang.srt.layers.moe.ep_moe.layer import DeepEPMoE
from sglang.srt.layers.moe.token_dispatcher import deepep
from sglang.srt.layers.moe.topk import StandardTopKOutput

from deep_ep_stand_in import Buffer, Network, module
from hopper_mxfp4_sglang.layer import MoEMethod
from no_sync import NoSync, dense_kernel
from sglang_ranks import (
    DEEPSEEK_FACTOR,
    Rank,
    deepseek_experts,
    gpt_oss_experts,
    prepare,
    run,
)
from test_sglang_experts import (
    EXPERTS,
    HIDDEN,
    INTERMEDIATE,
    TOP_K,
    calls,
    deepseek_reference,
    deepseek_tensors,
    gpt_oss_reference,
    gpt_oss_weights,
    load_deepseek,
    relative_l2,
)

pytestmark = pytest.mark.skipif(
    not hasattr(utils, "get_deepep_output_dtype"),
    reason="this SGLang's DeepEP always sends 8-bit tokens to its experts: declined",
)
RANKS, SLOTS = 2, 16  # tokens of a rank


@pytest.fixture(autouse=True)
def deep_ep(monkeypatch):
    """SGLang's dispatchers, as if DeepEP and DeepGEMM were installed."""
    stand_in = module()
    monkeypatch.setattr(deepep, "use_deepep", True)
    for name in ("Buffer", "Config"):
        monkeypatch.setattr(deepep, name, getattr(stand_in, name), raising=False)
    monkeypatch.setattr(deepep.deep_gemm_wrapper, "ENABLE_JIT_DEEPGEMM", True)
    monkeypatch.setenv("SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK", str(SLOTS))


class Expert(Rank):
    """One rank, whose dispatcher finds the buffer of that network."""

    def __init__(self, network, rank, mode="auto", **resolved):
        resolved = {"moe_a2a_backend": "deepep", "deepep_mode": mode} | resolved
        super().__init__(RANKS, rank, RANKS, resolved=resolved)
        self.buffer: Buffer = network.buffer(rank)

    def __enter__(self):
        super().__enter__()
        self.set(deepep.DeepEPBuffer, "get_deepep_buffer", lambda *_, **__: self.buffer)
        self.set(deepep.DeepEPBuffer, "clean_buffer", lambda: None)
        return self


def layer_of(family, rank):
    """A layer with its weights, and what it computes."""
    if family == "deepseek_v4":
        tensors = deepseek_tensors()
        experts = deepseek_experts(rank, 256, 384, 8, TOP_K)
        load_deepseek(rank, experts, tensors)
        prepare(rank, experts)
        return experts, lambda call: deepseek_reference(tensors, call)
    w = gpt_oss_weights()
    experts = gpt_oss_experts(rank, HIDDEN, INTERMEDIATE, EXPERTS, TOP_K)
    for name, tensor in w.tensors().items():
        shard = slice(rank.rank * EXPERTS // RANKS, (rank.rank + 1) * EXPERTS // RANKS)
        parameter = getattr(experts, experts.quant_method.parameters[name])
        parameter.data.copy_(tensor[shard])
    prepare(rank, experts)
    return experts, lambda call: gpt_oss_reference(w, call)


SIZES = {"deepseek_v4": (256, 8), "gpt_oss": (HIDDEN, EXPERTS)}


def senders(family, kind):
    """Each rank's own tokens: x, global ids, weights."""
    sent, (hidden, experts) = [], SIZES[family]
    for seed, count in enumerate({"uneven": (9, 0), "full": (SLOTS, SLOTS)}.get(kind, (SLOTS, 7))):
        x, ids, weights = calls(hidden, experts, max(count, 6), TOP_K, seed)
        x, ids, weights = x[:count], ids[:count], weights[:count]
        if kind == "full":  # all slots of one expert, and none of some others
            ids = torch.tensor([[1, experts - 1]] * count).int()
        elif kind == "none":  # no expert of the second rank gets a token
            ids = ids.clamp(max=experts // 2 - 1)
            ids[:, 1] = torch.where(ids[:, 1] == ids[:, 0], -1, ids[:, 1])
        sent.append((x, ids, weights))
    return sent


MODES = {"low_latency": "low_latency_dispatch", "normal": "dispatch"}


@pytest.mark.parametrize("kind", ["uneven", "full", "none"])
@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("family", list(SIZES))
def test_deepep(family, mode, kind):
    """SGLang chooses dispatcher and format by the batch; slots that nobody filled are NaN."""
    sent = senders(family, kind)
    network = Network(sent, SIZES[family][1])
    for r, call in enumerate(sent):
        rank = Expert(network, r)
        experts, reference = layer_of(family, rank)
        assert type(experts) is DeepEPMoE
        assert type(experts.quant_method) is MoEMethod
        with rank:
            set_is_extend_in_batch(mode == "normal")
        y = run(rank, experts, *call)
        assert rank.buffer.sent == [MODES[mode]]
        assert y.isfinite().all()
        assert y.shape == call[0].shape
    for call, result in zip(sent, network.results, strict=True):
        if len(call[0]):
            # Once the factor is in: the model multiplies after DeepEP has combined.
            assert relative_l2(result, reference(call)) < 5e-3


def test_the_routed_scaling_factor_is_the_models_after_deepep():
    """And not the router's: SGLang's two-batch overlap multiplies whatever the router did."""
    network = Network(senders("deepseek_v4", "uneven"), 8)
    experts, _ = layer_of("deepseek_v4", Expert(network, 0))
    assert experts.moe_runner_config.routed_scaling_factor == DEEPSEEK_FACTOR
    assert not experts.should_fuse_routed_scaling_factor_in_topk


@pytest.mark.parametrize("mode", list(MODES))
def test_two_batches_that_overlap(mode):
    """SGLang's own operations of its two-batch overlap, each half a step ahead of the other, up to
    the scaled output of the MoE; each half has a dispatcher of its own.
    """
    from sglang.srt.batch_overlap.operations import _StateDict
    from sglang.srt.models.deepseek_v2 import DeepseekV2MoE

    halves = [senders("deepseek_v4", "some"), senders("deepseek_v4", "full")]
    networks = [Network(sent, 8) for sent in halves]
    outputs = [[], []]
    for r in range(RANKS):
        rank = Expert(networks[0], r, enable_two_batch_overlap=True)
        experts, reference = layer_of("deepseek_v4", rank)
        assert len(experts.dispatcher._inners) == 2
        block = SimpleNamespace(
            ep_size=RANKS,
            layer_id=0,
            experts=experts,
            routed_scaling_factor=DEEPSEEK_FACTOR,
            routed_scaling_factor_fused_in_topk=experts.should_fuse_routed_scaling_factor_in_topk,
        )
        states = [_StateDict(), _StateDict()]
        for i, (state, sent) in enumerate(zip(states, halves, strict=True)):
            x, ids, weights = sent[r]
            state.tbo_subbatch_index, state.shared_output = i, None
            state.hidden_states_mlp_input = x
            state.topk_output = StandardTopKOutput(weights, ids, x)
        steps = [
            (i, operation)
            for pair in (
                ("op_dispatch_a", None),
                ("op_dispatch_b", "op_dispatch_a"),
                ("op_experts", "op_dispatch_b"),
                ("op_combine_a", "op_experts"),
                ("op_combine_b", "op_combine_a"),
                ("op_output", "op_combine_b"),
                (None, "op_output"),
            )
            for i, operation in enumerate(pair)
            if operation
        ]
        with rank, torch.inference_mode():
            set_is_extend_in_batch(mode == "normal")
            buffers = [network.buffer(r) for network in networks]
            for i, operation in steps:
                rank.buffer = buffers[i]
                getattr(DeepseekV2MoE, operation)(block, states[i])
        for i, (state, buffer) in enumerate(zip(states, buffers, strict=True)):
            assert buffer.sent == [MODES[mode]]
            outputs[i].append(state.hidden_states_mlp_output)
    for sent, network, scaled in zip(halves, networks, outputs, strict=True):
        for call, result in zip(sent, network.results, strict=True):
            assert relative_l2(result, reference(call)) < 5e-3
        # What the first rank's own experts gave back of its own tokens, scaled once.
        x, ids, weights = sent[0]
        own = torch.where(ids < 4, ids, -1)
        wanted = reference((x, own, weights)) * DEEPSEEK_FACTOR
        assert relative_l2(scaled[0], wanted) < 8e-3


@pytest.fixture
def dense(monkeypatch):
    monkeypatch.setenv("HOPPER_MXFP4_KERNEL", "dense")
    with dense_kernel():
        yield


@pytest.mark.parametrize("mode", list(MODES))
def test_nothing_waits_for_the_device(dense, mode):
    """Between dispatch and combine; DeepEP's normal dispatch itself does."""
    network = Network(senders("deepseek_v4", "full"), 8)
    rank = Expert(network, 0)
    experts, _ = layer_of("deepseek_v4", rank)
    assert experts.quant_method.prepared.kernel.name == "dense"
    x, ids, weights = network.senders[0]
    with rank, torch.inference_mode():
        set_is_extend_in_batch(mode == "normal")
        topk = StandardTopKOutput(topk_weights=weights, topk_ids=ids, router_logits=x)
        dispatched = experts.dispatcher.dispatch(hidden_states=x, topk_output=topk)
        first = experts.run_moe_core(dispatched).hidden_states
        with NoSync():
            again = experts.run_moe_core(dispatched).hidden_states
    assert torch.equal(again, first)
    assert again.isfinite().all()


@pytest.mark.parametrize("sent", ["fp8", "bf16"])
def test_tokens_of_8_bits_are_declined(caplog, sent):
    network = Network(senders("deepseek_v4", "uneven"), 8)
    rank = Expert(network, 0, deepep_dispatcher_output_dtype=sent)
    if sent == "bf16":
        experts, _ = layer_of("deepseek_v4", rank)
        assert type(experts.quant_method) is MoEMethod
        return
    with pytest.raises(SystemExit, match="--deepep-dispatcher-output-dtype fp8 sends its tokens"):
        layer_of("deepseek_v4", rank)
