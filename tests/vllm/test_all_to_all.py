"""Experts spread over data-parallel ranks, behind vLLM's own prepare and finalize classes.

DeepEP's buffers are stand-ins; each rank's layer is vLLM's, one after the other in this process.
"""

import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from vllm.distributed import parallel_state
from vllm.model_executor.layers.fused_moe import all2all_utils
from vllm.model_executor.layers.fused_moe import modular_kernel as mk
from vllm.model_executor.layers.fused_moe.prepare_finalize.batched import BatchedPrepareAndFinalize
from vllm.model_executor.model_loader.utils import process_weights_after_loading

from deep_ep_stand_in import Network, module
from hopper_mxfp4.checkpoint.random_gpt_oss import write_gpt_oss
from hopper_mxfp4_vllm import layer as layer_module
from hopper_mxfp4_vllm.experts import BatchedExperts
from hopper_mxfp4_vllm.layer import DeepseekV4Method, GptOssMethod
from models import (
    DEVICE,
    Rank,
    configure,
    deepseek_v4_moe,
    experts_of,
    gpt_oss,
    run,
    write_deepseek_v4_config,
)
from no_sync import NoSync, dense_kernel
from test_layers import (
    calls,
    deepseek_reference,
    deepseek_tensors,
    gpt_oss_reference,
    load_deepseek,
    relative_l2,
)

RANKS, EXPERTS, TOP_K, TOKENS = 2, 8, 2, 9
HIDDEN = {"gpt_oss": 2880, "deepseek_v4": 2016}
PADDED = {"gpt_oss": 3072, "deepseek_v4": 2048}  # the sizes that DeepEP's kernels have
SLOTS = 16  # tokens of a rank


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """By family: vLLM's config, and the checkpoint's tensors."""
    folder = tmp_path_factory.mktemp("models")
    sizes = {"hidden": HIDDEN["gpt_oss"], "intermediate": 64, "experts": EXPERTS, "top_k": TOP_K}
    write_gpt_oss(folder / "gpt_oss", layers=1, **sizes)
    deepseek = write_deepseek_v4_config(
        folder / "deepseek", hidden_size=HIDDEN["deepseek_v4"], moe_intermediate_size=64
    )
    gpt_oss_config, deepseek_config = configure(folder / "gpt_oss"), configure(deepseek)
    return {
        "gpt_oss": (gpt_oss_config, load_file(folder / "gpt_oss" / "model.safetensors")),
        "deepseek_v4": (deepseek_config, deepseek_tensors(deepseek_config)),
    }


class DataRank(Rank):
    """One of RANKS data-parallel ranks, whose experts are spread over all."""

    def __init__(self, config, rank, backend="allgather_reducescatter", buffer=None):
        super().__init__(config)
        self.config.parallel_config.enable_expert_parallel = True
        self.config.parallel_config.all2all_backend = backend
        self.config.scheduler_config.max_num_batched_tokens = SLOTS
        self.data_rank, self.buffer = rank, buffer

    def __enter__(self):
        config = super().__enter__()  # makes groups of one process
        parallel = config.parallel_config
        parallel.data_parallel_size, parallel.data_parallel_rank = RANKS, self.data_rank
        self.groups = [parallel_state._DP, parallel_state._EP]
        for group in self.groups:
            group.world_size, group.rank_in_group = RANKS, self.data_rank
        self.communicator = parallel_state._EP.device_communicator
        parallel_state._EP.device_communicator = SimpleNamespace(
            all2all_manager=SimpleNamespace(
                world_size=RANKS,
                dp_world_size=RANKS,
                rank=self.data_rank,
                get_handle=lambda arguments: self.buffer,
            )
        )
        return config

    def __exit__(self, *exception):
        parallel_state._EP.device_communicator = self.communicator
        for group in self.groups:
            group.world_size, group.rank_in_group = 1, 0
        self.config.parallel_config.data_parallel_size = 1
        super().__exit__(*exception)


def layer_of(family, rank, tensors):
    if family == "gpt_oss":
        experts = experts_of(gpt_oss(rank, tensors))
        assert type(experts.quant_method) is GptOssMethod
        return experts
    layer = deepseek_v4_moe(rank)
    experts = experts_of(layer)
    assert type(experts.quant_method) is DeepseekV4Method
    for parameter in experts.parameters():  # as memory that vLLM reloads into may be
        parameter.data.view(torch.uint8).fill_(255)
    load_deepseek(experts, tensors, as_bytes=True)
    with rank as config:
        process_weights_after_loading(layer, config.model_config, DEVICE)
    return experts


def reference(family, tensors, call):
    if family == "gpt_oss":
        return gpt_oss_reference(tensors, call)
    return deepseek_reference(tensors, call)


def senders(family, kind):
    """Each rank's own tokens: x, global ids, weights."""
    tokens = {"uneven": (TOKENS, 4), "full": (SLOTS, SLOTS), "none": (SLOTS, SLOTS)}[kind]
    sent = []
    for seed, count in enumerate(tokens):
        x, ids, weights = calls(HIDDEN[family], EXPERTS, max(count, 6), TOP_K, seed)
        x, ids, weights = x[:count], ids[:count], weights[:count]
        if kind == "full":  # all slots of one expert, and none of some others
            ids = torch.tensor([[3, 6]] * count).int()
        elif kind == "none":  # no expert of the second rank gets a token
            ids = ids.clamp(max=3)
            ids[:, 1] = torch.where(ids[:, 1] == ids[:, 0], -1, ids[:, 1])
        sent.append((x, ids, weights))
    return sent


@pytest.fixture
def deep_ep(monkeypatch):
    """vLLM's classes for DeepEP, as if it were installed."""
    monkeypatch.setitem(sys.modules, "deep_ep", module())
    from vllm.model_executor.layers.fused_moe.prepare_finalize import deepep_ll

    for name in ("DEEPEP_QUANT_BLOCK_SHAPE", "DeepEPLLPrepareAndFinalize"):
        monkeypatch.setattr(all2all_utils, name, getattr(deepep_ll, name), raising=False)
    return deepep_ll.DeepEPLLPrepareAndFinalize


@pytest.mark.parametrize("kind", ["uneven", "full", "none"])
@pytest.mark.parametrize("family", list(HIDDEN))
def test_deepep_low_latency(checkpoints, deep_ep, family, kind):
    """vLLM chooses the classes; weights are the senders', slots that nobody filled are NaN."""
    (config, tensors), sent = checkpoints[family], senders(family, kind)
    network = Network(sent, EXPERTS)
    for r, (x, ids, weights) in enumerate(sent):
        buffer = network.buffer(r)
        rank = DataRank(config, r, "deepep_low_latency", buffer)
        experts = layer_of(family, rank, tensors)
        kernel = experts.quant_method.moe_kernel
        assert type(kernel.prepare_finalize) is deep_ep
        assert type(kernel.fused_experts) is BatchedExperts
        hidden = experts.moe_config.hidden_dim
        assert hidden == PADDED[family]
        x = torch.nn.functional.pad(x, (0, hidden - x.shape[1]))  # as vLLM's runner does
        ids = ids.to(kernel.prepare_finalize.topk_indices_dtype())
        y = run(rank, experts, x, ids, weights, torch.tensor([len(x) for x, _, _ in sent]))
        assert buffer.sent == ["low_latency_dispatch"]
        assert y.isfinite().all()
        assert not y[:, HIDDEN[family] :].any()
    for call, result in zip(sent, network.results, strict=True):
        assert relative_l2(result, reference(family, tensors, call)) < 5e-3


class Shared(torch.nn.Module):
    """In place of vLLM's wrapper around a model's shared experts: notes when it is called."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, x, order):
        self.calls.append((x, order.name))


def test_shared_experts_run_while_tokens_are_on_their_way(checkpoints, deep_ep):
    """vLLM calls them itself once where its all-to-all can wait, and the experts are none the
    wiser."""
    (config, tensors), sent = checkpoints["deepseek_v4"], senders("deepseek_v4", "uneven")
    network = Network(sent, EXPERTS)
    for r, (x, ids, weights) in enumerate(sent):
        rank, shared = DataRank(config, r, "deepep_low_latency", network.buffer(r)), Shared()
        experts = layer_of("deepseek_v4", rank, tensors)
        assert experts.quant_method.mk_can_overlap_shared_experts
        padded = torch.nn.functional.pad(x, (0, PADDED["deepseek_v4"] - x.shape[1]))
        run(
            rank,
            experts,
            padded,
            ids.long(),
            weights,
            torch.tensor([len(x) for x, _, _ in sent]),
            shared_experts=shared,
            shared_experts_input=x,
        )
        ((seen, order),) = shared.calls
        assert seen is x
        assert order == "MK_INTERNAL_OVERLAPPED"
    for call, result in zip(sent, network.results, strict=True):
        assert relative_l2(result, reference("deepseek_v4", tensors, call)) < 5e-3


@pytest.mark.parametrize("family", list(HIDDEN))
def test_vllms_own_batched_format(checkpoints, monkeypatch, family):
    """vLLM's reference for the format counts the tokens of every rank's experts."""
    (config, tensors), call = checkpoints[family], calls(HIDDEN[family], EXPERTS, TOKENS, TOP_K)
    total = torch.zeros(TOKENS, HIDDEN[family])
    for r in range(RANKS):
        monkeypatch.setattr(
            layer_module,
            "maybe_make_prepare_finalize",
            lambda r=r, **options: BatchedPrepareAndFinalize(TOKENS, EXPERTS // RANKS, RANKS, r),
        )
        rank = DataRank(config, r)
        experts = layer_of(family, rank, tensors)
        assert type(experts.quant_method.experts) is BatchedExperts
        total += run(rank, experts, *call, torch.tensor([TOKENS] * RANKS)).float()
    assert relative_l2(total, reference(family, tensors, call)) < 5e-3


@pytest.fixture
def dense(monkeypatch):
    monkeypatch.setenv("HOPPER_MXFP4_KERNEL", "dense")
    with dense_kernel():
        yield


def test_the_batched_format_waits_for_nothing(checkpoints, deep_ep, dense):
    """Between dispatch and combine, as under a CUDA graph."""
    (config, tensors), sent = checkpoints["deepseek_v4"], senders("deepseek_v4", "uneven")
    network = Network(sent, EXPERTS)
    rank = DataRank(config, 0, "deepep_low_latency", network.buffer(0))
    experts = layer_of("deepseek_v4", rank, tensors)
    fused = experts.quant_method.experts
    assert fused.prepared.kernel.name == "dense"
    x, ids, _ = sent[0]
    x = torch.nn.functional.pad(x, (0, PADDED["deepseek_v4"] - x.shape[1]))
    received, counts, *_ = network.buffer(0).low_latency_dispatch(
        x, ids.long(), SLOTS, EXPERTS, use_fp8=False
    )
    shapes = fused.workspace_shapes(
        received.shape[1], 128, x.shape[1], TOP_K, EXPERTS, 4, None, None
    )
    assert shapes[2] == received.shape
    out = torch.full(shapes[2], float("nan")).bfloat16()
    arguments = {
        "output": out,
        "hidden_states": received,
        "w1": experts.w13_weight,
        "w2": experts.w2_weight,
        "topk_weights": None,
        "topk_ids": None,
        "activation": None,
        "global_num_experts": EXPERTS,
        "expert_map": None,
        "a1q_scale": None,
        "a2_scale": None,
        "workspace13": torch.empty(shapes[0]).bfloat16(),
        "workspace2": torch.empty(shapes[1]).bfloat16(),
        "expert_tokens_meta": mk.ExpertTokensMetadata(counts, None),
        "apply_router_weight_on_input": False,
    }
    fused.apply(**arguments)
    first = out.clone()
    out.fill_(float("nan"))
    with NoSync():
        fused.apply(**arguments)
    assert torch.equal(out, first)
    assert out.isfinite().all()
    for e, count in enumerate(counts.tolist()):
        assert not out[e, count:].any()
        assert out[e, :count].any() == (count > 0)
