"""Around vLLM's own weight loaders: which parameters they fill, and what they need done first."""

from collections.abc import Callable

import torch
from vllm.model_executor.layers.fused_moe import RoutedExperts

from hopper_mxfp4 import CheckpointFamily
from hopper_mxfp4.loading import fill_neutral, matching_chunks

Loader = Callable[..., bool | None]

# By what names vLLM's loaders find a layer's tensors.
PARAMETERS = {
    "w13": "w13_weight",
    "w2": "w2_weight",
    "w13_scale": "w13_weight_scale",
    "w2_scale": "w2_weight_scale",
    "w13_bias": "w13_bias",
    "w2_bias": "w2_bias",
}
# And where the checkpoint says weight_packed.
PACKED_PARAMETERS = PARAMETERS | {"w13": "w13_weight_packed", "w2": "w2_weight_packed"}


def emptying_first(
    loader: Loader, layer: RoutedExperts, name: str, family: CheckpointFamily
) -> Loader:
    """For experts that come as whole tensors, or one by one as shards of unequal size.

    Whatever the loader does not reach is neutral: on a reload vLLM gives it memory that holds
    anything. Whole tensors are handed over a few experts at a time.
    """

    def load(
        param: torch.nn.Parameter,
        loaded_weight: torch.Tensor,
        weight_name: str,
        shard_id: str | None,
        expert_id: int | None,
        return_success: bool = False,
    ) -> bool | None:
        if shard_id is None:  # all of this rank's experts at once
            fill_neutral(name, param.data)
            for target, source in matching_chunks(name, param.data, loaded_weight, family):
                few = torch.nn.Parameter(target, requires_grad=False)
                done = loader(few, source, weight_name, shard_id, expert_id, return_success)
            return done
        local = layer._map_global_expert_id_to_local_expert_id(expert_id)
        if local != -1:
            fill_neutral(name, param.data[local])
        return loader(param, loaded_weight, weight_name, shard_id, expert_id, return_success)

    return load


def scales_as_bytes(loader: Loader) -> Loader:
    """For scales that may come as float8_e8m0fnu, which vLLM's loader would convert by value."""

    def load(
        param: torch.nn.Parameter,
        loaded_weight: torch.Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        if loaded_weight.dtype not in (torch.uint8, torch.float8_e8m0fnu):
            raise ValueError(
                f"{weight_name} is {loaded_weight.dtype} in the checkpoint; its scales must be "
                "uint8 or float8_e8m0fnu"
            )
        as_bytes = loaded_weight.view(torch.uint8)
        return loader(param, as_bytes, weight_name, shard_id, expert_id, return_success)

    return load
