"""EPLB in vLLM's CPU engine, which moves experts by the code of the GPU engines but lacks three
parts of it: the permission, the state of its model runner, and the kernel that counts the load. An
engine's process imports this, and its workers as their `worker_extension_cls`.
"""

import torch
from vllm.config import parallel
from vllm.distributed.eplb.eplb_state import EplbState
from vllm.model_executor.layers.fused_moe.router import base_router
from vllm.model_executor.models.interfaces import get_mixture_of_experts_model
from vllm.platforms import current_platform
from vllm.v1.worker.cpu_model_runner import CPUModelRunner


class Extension:
    """Nothing beside what importing it does."""


class LikeCuda:
    """The platform, but for one answer: the config asks it whether there can be EPLB."""

    def is_cuda_alike(self):
        return True

    def __getattr__(self, name):
        return getattr(current_platform, name)


class Event:
    """vLLM times a rearrangement by two of these, and waits for a stream that it takes for one."""

    def __init__(self, **options):
        pass

    def record(self):
        pass

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return 0.0


def load_model(self, *args, original=CPUModelRunner.load_model, **kwargs):
    original(self, *args, **kwargs)
    if self.parallel_config.enable_eplb:
        self.eplb_state = EplbState(self.parallel_config, self.device)
        self._moe_model = get_mixture_of_experts_model(self.model)
        self.eplb_state.add_model(self._moe_model, self.model_config)


def map_and_record(
    topk_ids,
    expert_load_view,
    logical_to_physical_map,
    logical_replica_count,
    record_enabled,
    num_unpadded_tokens=None,
):
    """The slots of the chosen experts; a token takes the replica that its place in the batch says,
    by the kernel's own rule.
    """
    ids = topk_ids.long()
    places = torch.arange(len(ids)) * 2654435769 % 2**32
    replica = places[:, None] % logical_replica_count[ids]
    slots = logical_to_physical_map[ids, replica]
    if record_enabled:
        counted = slots[: int(num_unpadded_tokens)] if num_unpadded_tokens is not None else slots
        expert_load_view += torch.bincount(counted.flatten(), minlength=len(expert_load_view)).to(
            expert_load_view.dtype
        )
    return slots.to(topk_ids.dtype)


parallel.current_platform = LikeCuda()
CPUModelRunner.load_model = load_model
base_router.eplb_map_to_physical_and_record = map_and_record
torch.Event = Event
torch.accelerator.current_stream = Event
