"""SGLang's layers for one rank of any tensor- or expert-parallel size, in this one process.

They are on this machine's device.

Used by tests/gpu too, where SGLang's own Python is all there is of it.
"""

import inspect
import pickle
from contextlib import ExitStack
from types import SimpleNamespace

import torch
from sglang.srt.distributed import parallel_state
from sglang.srt.layers.moe.ep_moe.layer import get_moe_impl_class
from sglang.srt.layers.moe.fused_moe_triton import FusedMoE
from sglang.srt.layers.moe.token_dispatcher import standard
from sglang.srt.layers.moe.topk import StandardTopKOutput
from sglang.srt.layers.moe.utils import initialize_moe_config
from sglang.srt.layers.quantization.fp8 import Fp8Config
from sglang.srt.server_args import ServerArgs

from hopper_mxfp4_sglang.hooks import remember_model

try:
    from sglang.srt import runtime_context
except ImportError:  # up to 0.5.13
    runtime_context = None

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GROUPS = ("_WORLD", "_TP", "_PP", "_MOE_EP", "_MOE_TP", "_MOE_DP", "_ATTN_TP", "_ATTN_CP")
DEEPSEEK_FACTOR, DEEPSEEK_LIMIT = 1.5, 10.0
DEEPSEEK_CONFIG = {"model_type": "deepseek_v4", "swiglu_limit": DEEPSEEK_LIMIT}


class Rank:
    """SGLang's configuration as one rank sees it.

    Nothing is communicated: results are partial sums.

    expert_parallel: how many ranks the experts are spread over; the others share each expert's
    rows.
    resolved: options as SGLang chose them itself; options: as the user gave them, beside the sizes.
    """

    def __init__(
        self, size: int = 1, rank: int = 0, expert_parallel: int = 1, resolved=None, **options
    ):
        self.resolved = resolved or {}
        self.size, self.rank, self.expert_parallel, self.options = (
            size,
            rank,
            expert_parallel,
            options,
        )

    def __enter__(self):
        self.stack = ExitStack()
        tp = self.size // self.expert_parallel
        of_rank = {
            "_TP": (self.size, self.rank),
            "_MOE_EP": (self.expert_parallel, self.rank // tp),
            "_MOE_TP": (tp, self.rank % tp),
        }
        groups = {}
        for name in GROUPS:
            size, rank = of_rank.get(name, (1, 0))
            groups[name] = SimpleNamespace(
                world_size=size, rank_in_group=rank, rank=rank, device_group=None
            )
        args = ServerArgs(
            model_path="dummy",
            device="cpu",
            tp_size=self.size,
            ep_size=self.expert_parallel,
            **self.options,
        )
        if hasattr(args, "resolve_once"):  # keeps decisions beside what was given
            from sglang.srt.arg_groups.overrides import declare_resolution

            args.resolve_once()
            if self.resolved:
                declare_resolution(args, "test", **self.resolved)
        else:
            vars(args).update(self.resolved)
        self._publish(pickle.loads(pickle.dumps(args)), groups)  # as it reaches a scheduler
        if hasattr(standard, "get_device"):  # it knows no CPU
            self.set(standard, "get_device", lambda: DEVICE.type)
        initialize_moe_config(*[args][: len(inspect.signature(initialize_moe_config).parameters)])
        dtype = torch.get_default_dtype()
        self.stack.callback(torch.set_default_dtype, dtype)
        torch.set_default_dtype(torch.bfloat16)
        self.stack.enter_context(DEVICE)  # SGLang builds its models under the device
        return self

    def set(self, module, name, value):
        self.stack.callback(setattr, module, name, getattr(module, name))
        setattr(module, name, value)

    def _publish(self, args, groups):
        for name, group in groups.items():
            if hasattr(parallel_state, name):
                self.set(parallel_state, name, group)
        if runtime_context is None:
            from sglang.srt.server_args import set_global_server_args_for_scheduler

            set_global_server_args_for_scheduler(args)
        elif hasattr(runtime_context, "SpawnRanks"):  # sizes and ranks are the context's own
            runtime_context.get_parallel().clear_stamp()
            runtime_context.publish(
                args,
                role="test",
                ranks=runtime_context.SpawnRanks(world_rank=self.rank, dp_rank=None),
            )
            self.stack.enter_context(
                runtime_context.get_parallel().override(tp_group=groups["_TP"])
            )
        else:
            runtime_context.publish(args, role="test")
            ep, tp = groups["_MOE_EP"], groups["_MOE_TP"]
            sizes = {
                "tp_size": self.size,
                "moe_ep_size": ep.world_size,
                "moe_tp_size": tp.world_size,
            }
            ranks = {
                "tp_rank": self.rank,
                "moe_ep_rank": ep.rank_in_group,
                "moe_tp_rank": tp.rank_in_group,
            }
            self.stack.enter_context(
                runtime_context.get_parallel().override(**sizes, **ranks, tp_group=groups["_TP"])
            )

    def __exit__(self, *exception):
        self.stack.close()


class GptOss(torch.nn.Module):
    """As much of SGLang's GptOssForCausalLM as has experts.

    Its own sparse blocks and its own loader of MXFP4 experts.
    """

    def __init__(self, rank: Rank, config):
        from sglang.srt.layers.quantization.mxfp4 import Mxfp4Config
        from sglang.srt.models.gpt_oss import GptOssSparseMoeBlock

        super().__init__()
        self.config, self.rank = config, rank
        self.quant_config = of_model(Mxfp4Config.from_config({"quant_method": "mxfp4"}), config)
        self.model = torch.nn.Module()
        self.model.layers = torch.nn.ModuleList()
        with rank:
            for i in range(config.num_hidden_layers):
                layer = torch.nn.Module()
                layer.mlp = GptOssSparseMoeBlock(
                    i, config, self.quant_config, prefix=f"model.layers.{i}.mlp"
                )
                self.model.layers.append(layer)

    @property
    def block(self):
        return self.model.layers[0].mlp

    @property
    def experts(self):
        return self.block.experts

    def load_weights(self, weights) -> None:
        from sglang.srt.models.gpt_oss import GptOssForCausalLM

        with self.rank:
            if DEVICE.type == "cpu":  # up to 0.5.12 it calls it on every tensor
                self.rank.set(torch.Tensor, "cuda", lambda tensor: tensor)
            GptOssForCausalLM._load_mxfp4_experts_weights(
                self, ((name, t) for name, t in weights if ".experts" in name)
            )


def gpt_oss_config(hidden: int, intermediate: int, experts: int, top_k: int, layers: int = 1):
    from transformers import GptOssConfig

    return GptOssConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_local_experts=experts,
        num_experts_per_tok=top_k,
        swiglu_limit=7.0,
        dtype=torch.bfloat16,
        hidden_act="silu",
    )


def of_model(quant_config, hf_config, is_draft: bool = False):
    """The quantisation of that model, as our hook on SGLang's loader leaves it."""
    remember_model(quant_config, SimpleNamespace(hf_config=hf_config, is_draft_model=is_draft))
    return quant_config


def gpt_oss_experts(
    rank: Rank,
    hidden: int,
    intermediate: int,
    experts: int,
    top_k: int,
    hf_config=None,
    **options,
):
    """The FusedMoE layer of SGLang's GPT-OSS block, without its router."""
    from sglang.srt.layers.quantization.mxfp4 import Mxfp4Config

    hf_config = hf_config or {"model_type": "gpt_oss", "swiglu_limit": 7.0}
    options = {"gemm1_alpha": 1.702, "gemm1_clamp_limit": 7.0, "with_bias": True} | options
    with rank:
        return get_moe_impl_class(None)(
            num_experts=experts,
            top_k=top_k,
            hidden_size=hidden,
            intermediate_size=intermediate,
            layer_id=0,
            quant_config=of_model(Mxfp4Config.from_config({"quant_method": "mxfp4"}), hf_config),
            prefix="model.layers.0.mlp.experts",
            **options,
        )


def deepseek_quant_config(hf_config=None, is_draft: bool = False, **changes) -> Fp8Config:
    """What SGLang makes of the quantisation of DeepSeek-V4, or of another model of this kind."""
    config = Fp8Config(
        is_checkpoint_fp8_serialized=True, activation_scheme="dynamic", weight_block_size=[128, 128]
    )
    for name, value in (
        {"is_fp4_experts": True, "is_dsv4_fp4_experts": True, "dequant_fp4_to_fp8": False} | changes
    ).items():
        setattr(config, name, value)
    return of_model(config, hf_config or DEEPSEEK_CONFIG, is_draft)


def deepseek_experts(
    rank: Rank,
    hidden: int,
    intermediate: int,
    experts: int,
    top_k: int,
    config: Fp8Config | None = None,
    **options,
):
    """A FusedMoE layer as SGLang's DeepSeek-V4 model asks for it."""
    options = {"routed_scaling_factor": DEEPSEEK_FACTOR, "swiglu_limit": DEEPSEEK_LIMIT} | options
    with rank:
        return get_moe_impl_class(None)(
            num_experts=experts,
            top_k=top_k,
            hidden_size=hidden,
            intermediate_size=intermediate,
            layer_id=0,
            quant_config=config or deepseek_quant_config(),
            prefix="model.layers.0.mlp.experts",
            **options,
        )


def prepare(rank: Rank, model: torch.nn.Module) -> None:
    """What SGLang does when all weights are loaded."""
    with rank:
        for module in model.modules():
            method = getattr(module, "quant_method", None)
            if hasattr(method, "process_weights_after_loading"):
                method.process_weights_after_loading(module)


def restore(rank: Rank, model: torch.nn.Module) -> None:
    """What SGLang does from 0.5.21 on before it loads weights again."""
    with rank:
        for module in model.modules():
            method = getattr(module, "quant_method", None)
            if hasattr(method, "restore_weights_before_loading"):
                method.restore_weights_before_loading(module)


def run(
    rank: Rank,
    experts: FusedMoE,
    x: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
) -> torch.Tensor:
    """The routed experts' partial result on this rank, through SGLang's dispatcher.

    For global ids.
    """
    with rank, torch.inference_mode():
        forward = getattr(experts, "forward_impl", experts.forward)
        return forward(
            x, StandardTopKOutput(topk_weights=topk_weights, topk_ids=topk_ids, router_logits=x)
        )
