"""What differs between the checkpoints that hold MXFP4 experts, as data."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .swiglu import SwiGLU


def config_get(config: Any, name: str, default: Any = None) -> Any:
    """A field of a Hugging Face config, which may be an object or a dict."""
    if isinstance(config, Mapping):
        return config.get(name, default)
    return getattr(config, name, default)


@dataclass(frozen=True)
class CheckpointFamily:
    """How one family of checkpoints stores its experts.

    name: what users and logs call it.
    model_types: values of the Hugging Face config's ``model_type`` that belong to it.
    rows: order of w13's rows: ``interleaved`` is g0,u0,g1,u1..; ``gate_up`` is all gate, then all up.
    bias: whether both projections have a bias.
    alpha, beta, limit: SwiGLU parameters; a config's own ``swiglu_alpha`` and ``swiglu_limit`` come first.
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


# alpha, beta: gpt-oss's reference implementation (openai/gpt-oss, torch/model.py, swiglu); its published config holds only the limit.
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


def family_for(hf_config: Any) -> CheckpointFamily:
    """The family that a model's Hugging Face config (object or dict) belongs to.

    Raises ValueError, with the model_type seen and those known, if no registered family claims it.
    """
    from .plugins import families  # the registry's built-ins are the families above

    model_type = config_get(hf_config, "model_type")
    known = families()
    for family in known.values():
        if model_type in family.model_types:
            return family
    types = sorted(t for f in known.values() for t in f.model_types)
    raise ValueError(
        f"no checkpoint family for model_type {model_type!r}; known are {', '.join(types)}"
    )
