"""Expert parallelism by batched experts over torch.distributed: what DeepEP's low-latency kernels
do, in all-to-alls of whole buffers. How many tokens came is never asked for on the host.
"""

import os
import socket
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from hopper_mxfp4 import (
    DEEPSEEK_V4,
    ExpertWeights,
    SwiGLU,
    batched_moe,
    prepare_experts,
    reference_moe,
)
from random_layers import clone, random_weights

EXPERTS, HIDDEN, INTERMEDIATE, TOP_K, TOKENS = 8, 256, 160, 3, 21
SWIGLU = SwiGLU(1.0, 0.0, 10.0)


def run_ranks(count: int, kernel: str, device: str, folder: Path) -> list[dict[str, float]]:
    """A process a rank; what each saw: the relative L2 of its tokens to the reference's, and how
    many of its values differed when everything was done again.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(_rank, (count, kernel, device, port, folder), nprocs=count, join=True)
    return [torch.load(folder / f"{rank}.pt") for rank in range(count)]


def _rank(rank: int, count: int, kernel: str, kind: str, port: int, folder: Path) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", rank=rank, world_size=count)
    whole = random_weights(DEEPSEEK_V4, EXPERTS, HIDDEN, INTERMEDIATE)
    whole = ExpertWeights(**{name: t.to(device) for name, t in whole.tensors().items()})
    own = EXPERTS // count
    shard = {n: t[rank * own : (rank + 1) * own] for n, t in clone(whole).tensors().items()}
    p = prepare_experts(
        ExpertWeights(**shard), family=DEEPSEEK_V4, swiglu=SWIGLU, kernel=kernel, ep_size=count
    )
    g = torch.Generator().manual_seed(rank)
    tokens = TOKENS + rank  # ranks have different numbers of them
    x = torch.randn(tokens, HIDDEN, generator=g).bfloat16().to(device)
    weights, ids = torch.randn(tokens, EXPERTS, generator=g).topk(TOP_K)
    call = x, ids.int().to(device), weights.softmax(-1).to(device)
    y, again = (experts_of_all_ranks(*call, p, count) for _ in range(2))
    wanted = reference_moe(*call, whole, family=DEEPSEEK_V4, swiglu=SWIGLU)
    seen = {
        "relative_l2": ((y - wanted).norm() / wanted.norm()).item(),
        "differ": (y != again).sum().item(),
    }
    torch.save(seen, folder / f"{rank}.pt")
    dist.destroy_process_group()


def experts_of_all_ranks(x, ids, weights, p, count):
    """float32 [tokens, hidden]: the layer's output for this rank's tokens."""
    slots, own = TOKENS + count, EXPERTS // count  # room for all of a rank's tokens in each expert
    pairs = ids.flatten().long()
    # A pair's place among those of its expert, in the order of pairs.
    chosen = torch.nn.functional.one_hot(pairs, EXPERTS)
    place = (chosen.cumsum(0) - chosen).gather(1, pairs[:, None]).flatten()
    sent = x.new_full((EXPERTS, slots, HIDDEN), float("nan"))
    sent[pairs, place] = x.repeat_interleave(TOP_K, 0)
    counts = chosen.sum(0).int()

    received, from_ranks = torch.empty_like(sent), torch.empty_like(counts)
    dist.all_to_all_single(received, sent)
    dist.all_to_all_single(from_ranks, counts)
    received = received.view(count, own, slots, HIDDEN)
    from_ranks = from_ranks.view(count, own)

    # Behind each other in each expert's slots; what nobody sent goes to a last one, and is dropped.
    slot = torch.arange(slots, device=x.device)
    begins = from_ranks.cumsum(0) - from_ranks
    to = torch.where(slot < from_ranks[..., None], begins[..., None] + slot, count * slots)
    expert = torch.arange(own, device=x.device)[None, :, None].expand_as(to)
    batch = x.new_full((own, count * slots + 1, HIDDEN), float("nan"))
    batch[expert, to] = received
    y = batched_moe(batch[:, :-1].contiguous(), from_ranks.sum(0).int(), p)

    back = torch.nn.functional.pad(y, (0, 0, 0, 1))[expert, to].view(EXPERTS, slots, HIDDEN)
    returned = torch.empty_like(back)
    dist.all_to_all_single(returned, back)
    of_pairs = returned[pairs, place].view(*ids.shape, HIDDEN).float()
    return (of_pairs * weights[..., None]).sum(1)
