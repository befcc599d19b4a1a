"""DeepEP's buffers without a network, for the frameworks' own classes on top of them.

All senders' tokens are known from the start, and the ranks run one after the other: what a rank
receives is what DeepEP would have sent it, and what it gives back is added up for each sender.
Shapes, dtypes and meanings are those of DeepEP's documented interface (its README and
deep_ep/buffer.py); only BF16 is sent.
"""

from types import SimpleNamespace
from typing import Any

import torch

Sender = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # x, global ids (-1: none), weights


class Event:
    def current_stream_wait(self) -> None:
        """Nothing runs beside."""


class Network:
    """Ranks with equal shares of the experts, each of which sends its own tokens.

    results: what each sender gets back, float32, summed over the ranks that have run.
    """

    def __init__(self, senders: list[Sender], num_experts: int):
        self.senders, self.num_experts = senders, num_experts
        self.ranks = len(senders)
        self.results = [torch.zeros(x.shape) for x, _, _ in senders]

    def buffer(self, rank: int) -> "Buffer":
        return Buffer(self, rank)


class Buffer:
    """deep_ep.Buffer as one rank has it."""

    num_sms = 20
    low_latency_mode = True

    def __init__(self, network: Network, rank: int):
        self.network, self.rank = network, rank
        self.group_size = network.ranks
        self.local_experts = network.num_experts // network.ranks
        self.first_expert = rank * self.local_experts
        self.sent: list[str] = []  # what was called, for tests to look at

    @staticmethod
    def capture() -> Event:
        return Event()

    def _check_sender(self, x: torch.Tensor, ids: torch.Tensor) -> None:
        assert x.dtype == torch.bfloat16
        assert ids.dtype == torch.int64
        own_x, own_ids, _ = self.network.senders[self.rank]
        assert torch.equal(x[:, : own_x.shape[1]], own_x)
        assert torch.equal(ids, own_ids.long())

    # --- low latency: each expert's tokens in slots, in whatever order ranks arrive ---

    def low_latency_dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
    ) -> Any:
        """Slots that nobody sent a token to are NaN: DeepEP leaves them as they were."""
        assert not use_fp8
        assert not round_scale
        assert not use_ue8m0
        self._check_sender(x, topk_idx)
        network, slots = self.network, num_max_dispatch_tokens_per_rank * self.network.ranks
        assert num_experts == network.num_experts
        received = torch.full((self.local_experts, slots, x.shape[1]), float("nan"), dtype=x.dtype)
        handle: list[list[tuple[int, int]]] = [[] for _ in range(self.local_experts)]
        for sender in [*range(self.rank, network.ranks), *range(self.rank)]:
            sent, ids, _ = network.senders[sender]
            assert len(sent) <= num_max_dispatch_tokens_per_rank
            for e in range(self.local_experts):
                for token in (ids == self.first_expert + e).any(1).nonzero().flatten().tolist():
                    slot = len(handle[e])
                    received[e, slot] = 0  # a framework pads x with zeros
                    received[e, slot, : sent.shape[1]] = sent[token]
                    handle[e].append((sender, token))
        counts = torch.tensor([len(slots) for slots in handle], dtype=torch.int32)
        self.sent.append("low_latency_dispatch")
        return received, counts, handle, Event(), lambda: None

    def low_latency_combine(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        handle: Any,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: torch.Tensor | None = None,
    ) -> Any:
        """Weights by the senders' own weights, where the tokens come back to."""
        assert x.dtype == torch.bfloat16
        assert topk_weights.dtype == torch.float32
        back = [torch.zeros(len(r), x.shape[2]) for r in self.network.results]
        for e, slots in enumerate(handle):
            for slot, (sender, token) in enumerate(slots):
                _, ids, weights = self.network.senders[sender]
                weight = weights[token][ids[token] == self.first_expert + e].sum()
                back[sender][token] += weight * x[e, slot].float()
        return self._give_back(back, out), Event(), lambda: None

    # --- normal: each token once a rank, with the ids and weights of the rank's own experts ---

    def get_dispatch_layout(
        self, topk_idx: torch.Tensor, num_experts: int, **options: Any
    ) -> tuple[Any, ...]:
        assert num_experts == self.network.num_experts
        return None, None, None, None, Event()

    def dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        num_tokens_per_rank: Any = None,
        num_tokens_per_rdma_rank: Any = None,
        is_token_in_rank: Any = None,
        num_tokens_per_expert: Any = None,
        **options: Any,
    ) -> Any:
        assert topk_weights.dtype == torch.float32
        self._check_sender(x, topk_idx)
        rows, handle = [], []
        for sender, (sent, ids, weights) in enumerate(self.network.senders):
            local = ids.long() - self.first_expert
            here = (local >= 0) & (local < self.local_experts)
            for token in here.any(1).nonzero().flatten().tolist():
                mine = here[token]
                rows.append(
                    (
                        sent[token],
                        torch.where(mine, local[token], -1),
                        torch.where(mine, weights[token], 0.0),
                    )
                )
                handle.append((sender, token))
        top_k = topk_idx.shape[1]
        empty = (x[:0], topk_idx[:0, :top_k], topk_weights[:0, :top_k])
        stacked = tuple(torch.stack(t) for t in zip(*rows, strict=True)) if rows else empty
        counts = [int((stacked[1] == e).sum()) for e in range(self.local_experts)]
        self.sent.append("dispatch")
        return *stacked, counts, handle, Event()

    def combine(self, x: torch.Tensor, handle: Any, **options: Any) -> Any:
        """Sums, and does not weight."""
        assert x.dtype == torch.bfloat16
        back = [torch.zeros(r.shape) for r in self.network.results]
        assert len(x) == len(handle)
        for row, (sender, token) in enumerate(handle):
            back[sender][token] += x[row].float()
        return self._give_back(back, None), None, Event()

    def _give_back(self, back: list[torch.Tensor], out: torch.Tensor | None) -> torch.Tensor:
        for result, part in zip(self.network.results, back, strict=True):
            result += part[:, : result.shape[1]]
        own = back[self.rank].bfloat16()
        return own if out is None else out.copy_(own)


def module() -> Any:
    """What `import deep_ep` gives."""
    config = type("Config", (), {"__init__": lambda self, **values: None})
    return SimpleNamespace(Buffer=Buffer, Config=config, __name__="deep_ep", __spec__=None)
