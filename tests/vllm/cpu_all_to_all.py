"""The two collectives that the communicator of vLLM's CPU engine lacks for data-parallel ranks with
experts spread over them. An engine's worker imports this as its `worker_extension_cls`.
"""

import torch
import torch.distributed as dist
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator


class Extension:
    """Nothing beside what importing it does."""


def all_gatherv(self, input_, dim=0, sizes=None):
    """Rows of every rank, of which each may have another number."""
    assert dim == 0
    if isinstance(input_, list):
        return [all_gatherv(self, t, dim, sizes) for t in input_]
    parts = []
    for rank, size in enumerate(sizes or [len(input_)] * self.world_size):
        part = input_.new_empty((size, *input_.shape[1:]))
        if rank == self.rank_in_group:
            part.copy_(input_)
        if part.numel():  # as bytes: Gloo does not know every dtype
            as_bytes = part.view(torch.uint8) if part.dim() else part
            dist.broadcast(as_bytes, src=self.ranks[rank], group=self.device_group)
        parts.append(part)
    return torch.cat(parts)


def reduce_scatterv(self, input_, dim=0, sizes=None):
    """This rank's rows of the sum."""
    assert dim == 0
    sizes = sizes or [len(input_) // self.world_size] * self.world_size
    total = input_.float()
    dist.all_reduce(total, group=self.device_group)
    return total.split(list(sizes))[self.rank_in_group].to(input_.dtype).contiguous()


CpuCommunicator.all_gatherv = all_gatherv
CpuCommunicator.reduce_scatterv = reduce_scatterv
