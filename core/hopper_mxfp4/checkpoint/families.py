"""What differs between the checkpoints that hold MXFP4 experts, as data."""

from dataclasses import dataclass
from typing import Any, Literal

from hopper_mxfp4.checkpoint.swiglu import SwiGLU
from hopper_mxfp4.registry import config_get


@dataclass(frozen=True)
class CheckpointFamily:
    """How one family of checkpoints stores its experts.

    name: what users and logs call it.
    model_types: values of the Hugging Face config's ``model_type`` that belong to it.
    rows: order of w13's rows: ``interleaved`` is g0,u0,g1,u1..; ``gate_up`` is all gate, then all
        up.
    bias: whether both projections have a bias.
    alpha, beta, limit: SwiGLU parameters; a config's own ``swiglu_alpha`` and ``swiglu_limit`` come
        first.
    """

    name: str
    model_types: tuple[str, ...]
    rows: Literal["interleaved", "gate_up"]
    bias: bool
    alpha: float = 1.0
    beta: float = 0.0
    limit: float | None = None

    def swiglu(self, hf_config: Any) -> SwiGLU:
        """The activation for a model of this family."""
        alpha, limit = config_get(hf_config, "swiglu_alpha"), config_get(hf_config, "swiglu_limit")
        if alpha is None:
            alpha = self.alpha
        if limit is None:
            limit = self.limit
        return SwiGLU(alpha, self.beta, limit or None)  # some configs write "no clamp" as 0


# alpha, beta: gpt-oss's reference implementation (openai/gpt-oss, torch/model.py, swiglu); its
# published config holds only the limit.
GPT_OSS = CheckpointFamily(
    "gpt_oss", ("gpt_oss",), rows="interleaved", bias=True, alpha=1.702, beta=1.0, limit=7.0
)
# deepseek_mtp: the draft head of the same checkpoint, which holds the same kind of experts.
DEEPSEEK_V4 = CheckpointFamily(
    "deepseek_v4",
    ("deepseek_v4", "deepseek_v4_text", "deepseek_v41", "deepseek_v41_text", "deepseek_mtp"),
    rows="gate_up",
    bias=False,
)
# What vLLM's and SGLang's loaders make of checkpoints that hold each expert's projections apart,
# whoever wrote them: gate into the first half of w13, up into the second. It claims no model_type;
# an adapter uses it for a model of which nobody registered a family, where the framework's own
# layer says that it has no bias and which activation it has.
GENERIC = CheckpointFamily("generic", (), rows="gate_up", bias=False)
