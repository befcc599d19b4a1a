"""What `hopper-mxfp4 bench --engine vllm` needs inside of each of an engine's workers.

A worker imports this by its name, however its process was started, before it loads
the model; vLLM then calls the methods of `Extension` on every rank (`LLM.collective_rpc`).
"""

import inspect
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

from hopper_mxfp4.bench.random_model import fill_parameters, generator_of

from .engine import RANDOM

REPEATS, PASSES = 7, 10  # measurements, and passes through all layers in each


@register_model_loader(RANDOM)
class RandomModelLoader(DummyModelLoader):
    """vLLM's own dummy weights send every token to the same experts."""

    def load_weights(self, model: Any, *args: Any, **kwargs: Any) -> None:
        fill(model)


def fill(model: Any) -> None:
    """Random weights, and for routers by token id (DeepSeek-V4's first layers) random experts."""
    # The E8M0 parameters are scales of FP8 weights of order one.
    fill_parameters(model, e8m0=(121, 122))
    for name, gate in model.named_modules():
        experts = getattr(gate, "tid2eid", None)
        if experts is not None:  # the experts of each token id, without one twice
            scores = torch.empty(len(experts), len(gate.weight), device=experts.device)
            scores.uniform_(generator=generator_of(name, experts.device))
            experts.data.copy_(scores.topk(experts.shape[1]).indices)


class Extension:
    """Methods that vLLM adds to its workers. Their names must not be among a worker's own."""

    model_runner: Any
    vllm_config: Any
    device: Any

    def bench_methods(self) -> dict[str, int]:
        """What serves the MoE layers of this rank, by how many."""
        found: dict[str, int] = {}
        for module in self.model_runner.get_model().modules():
            method = getattr(module, "quant_method", None)
            if not isinstance(method, FusedMoEMethodBase):
                continue
            kernel = getattr(method, "kernel", None)
            served = getattr(kernel, "name", None) or getattr(method, "mxfp4_backend", None)
            name = f"{type(method).__name__} {served}"
            found[name] = found.get(name, 0) + 1
        return found

    @torch.inference_mode()
    def bench_moe_ms(self, batches: Sequence[int]) -> dict[str, float]:
        """Milliseconds of one pass of random tokens through all MoE blocks, by their number.

        On a GPU from a CUDA graph, as in a decode step; every rank must be asked at once.
        """
        blocks = moe_blocks(self.model_runner.get_model())
        return {str(batch): round(self._pass_ms(blocks, batch), 4) for batch in batches}

    def _pass_ms(self, blocks: list[Any], batch: int) -> float:
        config = self.vllm_config.model_config
        g = torch.Generator(self.device).manual_seed(batch)
        x = torch.randn(
            batch, config.get_hidden_size(), generator=g, device=self.device, dtype=config.dtype
        )
        ids = torch.randint(
            config.get_vocab_size(), (batch,), generator=g, device=self.device, dtype=torch.int32
        )

        def once() -> None:
            with set_forward_context(None, self.vllm_config, num_tokens=batch):
                for block in blocks:
                    if "input_ids" in inspect.signature(block.forward).parameters:
                        block(x, input_ids=ids)
                    else:
                        block(x)

        once()
        if self.device.type != "cuda":
            return statistics.median(_seconds(once) for _ in range(3)) * 1e3
        replay = _captured(once, self.device)
        replay()
        return statistics.median(_gpu_ms(replay) for _ in range(REPEATS))


def moe_blocks(model: Any) -> list[Any]:
    """A model's MoE blocks in order: the outermost modules whose `experts` have a MoE method."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        experts = getattr(module, "experts", None)
        if not isinstance(experts, torch.nn.Module) or any(
            name.startswith(f"{outer}.") for outer in found
        ):
            continue
        methods = (getattr(inner, "quant_method", None) for inner in experts.modules())
        if any(isinstance(method, FusedMoEMethodBase) for method in methods):
            found[name] = module
    return list(found.values())


def _captured(once: Callable[[], None], device: Any) -> Callable[[], None]:
    from vllm.distributed.parallel_state import graph_capture

    graph = torch.cuda.CUDAGraph()
    # vLLM's own context: its all-reduce registers what is captured with the other ranks.
    with graph_capture(device) as context:
        once()  # on this stream, where whatever a first call sets up must not be captured
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=context.stream):
            once()
    return graph.replay


def _gpu_ms(replay: Callable[[], None]) -> float:
    start, end = (torch.Event("cuda", enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(PASSES):
        replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / PASSES


def _seconds(once: Callable[[], None]) -> float:
    began = time.perf_counter()
    once()
    return time.perf_counter() - began
