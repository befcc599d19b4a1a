"""Around SGLang's own weight loaders: the part of a parameter that each is to fill."""

from collections.abc import Callable
from typing import Any

import torch

from hopper_mxfp4 import CheckpointFamily, LayerShape
from hopper_mxfp4.loading import fill_neutral, matching_chunks
from hopper_mxfp4.plugin import BLOCK

Loader = Callable[..., None]


def filling_corner(
    loader: Loader,
    name: str,
    shape: LayerShape,
    family: CheckpointFamily,
    before: Callable[[], None],
) -> Loader:
    """SGLang's loader, for a parameter that may be larger than what the checkpoint has.

    Whole tensors are handed over a few experts at a time, and what they do not fill is neutral.

    before: what to do each time before anything is loaded.
    """
    is_scale, i, h = name.endswith("scale"), shape.intermediate_size, shape.hidden_size
    rows, k = (2 * i, h) if name.startswith("w13") else (h, i)
    columns = k // (BLOCK if is_scale else 2)

    def load(
        param: Any,
        loaded_weight: torch.Tensor,
        weight_name: str,
        shard_id: str | None,
        expert_id: int | None,
    ) -> None:
        before()
        if expert_id is None:  # all of this rank's experts
            fill_neutral(name, param.data)
            for target, source in matching_chunks(name, param.data, loaded_weight, family):
                loader(part_of(param, target), source, weight_name, shard_id, expert_id)
            return
        if family.rows == "interleaved":
            raise ValueError(
                f"{weight_name} came for expert {expert_id} alone, and SGLang's loader can't "
                f"interleave {family.name}'s rows; serve this model with stock SGLang"
            )
        if is_scale and loaded_weight.dtype == torch.uint8:
            # Else the bytes would be converted as numbers.
            loaded_weight = loaded_weight.view(param.dtype)
        # SGLang takes w13 for two halves of equal size: begin where the half it fills is in place.
        start = param.shape[1] // 2 - i if shard_id == "w3" else 0
        loader(
            part_of(param, param.data[:, start : start + rows, :columns]),
            loaded_weight,
            weight_name,
            shard_id,
            expert_id,
        )

    return load


def part_of(param: Any, data: torch.Tensor) -> torch.nn.Parameter:
    """A view that SGLang's loader takes for the parameter."""
    part = torch.nn.Parameter(data, requires_grad=False)
    part.__dict__.update(param.__dict__)
    return part
