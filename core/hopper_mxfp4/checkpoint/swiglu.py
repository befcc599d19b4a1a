"""The gated activation of the experts, with its three parameters."""

from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch

from hopper_mxfp4.registry import family_for

_LARGEST = torch.finfo(torch.float32).max


def _finite(value: Any) -> bool:
    """Whether a config's value is a number that a kernel's float32 can hold."""
    is_number = isinstance(value, Real)  # numpy's too
    return is_number and abs(value) <= _LARGEST


@dataclass(frozen=True)
class SwiGLU:
    """``gate * sigmoid(alpha * gate) * (up + beta)``, clamped first if there is a limit.

    With a limit L, gate is clamped to at most L and up to [-L, L] before anything else.
    GPT-OSS uses (1.702, 1, 7); DeepSeek-V4 (1, 0, its config's swiglu_limit), which is SiLU.

    Raises ValueError where alpha or beta is not finite, or limit is not a positive number.
    """

    alpha: float = 1.0
    beta: float = 0.0
    limit: float | None = None

    def __post_init__(self) -> None:
        for name in ("alpha", "beta"):
            if not _finite(getattr(self, name)):
                raise ValueError(f"SwiGLU {name} is {getattr(self, name)}; give a finite number")
        if self.limit is not None and not (_finite(self.limit) and self.limit > 0):
            raise ValueError(
                f"SwiGLU limit is {self.limit}; give a positive number, or None for no clamp"
            )

    @classmethod
    def from_config(cls, hf_config: Any) -> "SwiGLU":
        """The activation of a model, from its Hugging Face config (object or dict).

        Raises ValueError if no registered family knows the config's model_type.
        """
        return family_for(hf_config).swiglu(hf_config)

    def __call__(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Apply to two tensors of one shape and dtype; returns a new tensor of that shape and
        dtype.
        """
        if self.limit is not None:
            gate = gate.clamp(max=self.limit)
            up = up.clamp(-self.limit, self.limit)
        return gate * torch.sigmoid(self.alpha * gate) * (up + self.beta)
