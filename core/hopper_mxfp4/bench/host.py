"""What one `fused_moe` call costs the host, outside of a CUDA graph."""

from functools import partial
from typing import Any

import torch

from hopper_mxfp4 import fused_moe, observe
from hopper_mxfp4.bench.baselines import STOCK, Layer
from hopper_mxfp4.bench.timing import synchronize, time_host
from hopper_mxfp4.bench.workloads import Workload, make_batch
from hopper_mxfp4.kernels.flashinfer.kernel import TacticPlan


def host_overhead(workload: Workload, layer: Layer, kernel: str, tokens: int = 1) -> dict[str, Any]:
    """Microseconds of host time a call, best of fifty batches.

    total: fused_moe with ``out`` given. python: the same without what launches (our kernels through
    the driver, FlashInfer's compiled runner, torch's copy that trims), ours to keep small. wrapper:
    FlashInfer's own function on the same call, for comparison, where kernel is flashinfer.
    """
    device, p = layer.device, layer.prepared(kernel)
    call = make_batch(workload, tokens, "uniform", device, seed=0)
    out = torch.empty_like(call.x)
    run = partial(fused_moe, call.x, call.ids, call.weights, p, out=out)
    run()
    synchronize(device)
    found: dict[str, Any] = {
        "workload": workload.name,
        "tokens": tokens,
        "kernel": kernel,
        "total_us": time_host(run, device),
    }
    plan = p.plans.get((kernel, workload.top_k))
    # FlashInfer without tactics of ours is called through its wrapper, whose Python is not ours.
    if not isinstance(plan, TacticPlan) or (plan.direct is not None and plan.pairs):
        with observe.launching_nothing():
            found["python_us"] = time_host(run, device)
        if isinstance(plan, TacticPlan) and p.w2.shape[1] != workload.hidden:
            padded = torch.empty(tokens, p.w2.shape[1], dtype=torch.bfloat16, device=device)
            found["python_us"] -= time_host(
                partial(out.copy_, padded[:, : workload.hidden]), device
            )
    if isinstance(plan, TacticPlan) and device.type == "cuda":
        found["wrapper_us"] = time_host(STOCK["flashinfer-default"](layer)(call), device)
    return {
        name: round(value, 2) if isinstance(value, float) else value
        for name, value in found.items()
    }
