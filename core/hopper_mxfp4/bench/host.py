"""What one `fused_moe` call costs the host, outside of a CUDA graph."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from .. import fused_moe
from ..kernels import staging
from ..kernels.flashinfer import Plan
from .bodies import Body, make_call
from .peers import STOCK, Layer
from .timing import synchronize, time_host


def host_overhead(body: Body, layer: Layer, kernel: str, tokens: int = 1) -> dict[str, Any]:
    """Microseconds of host time a call, best of fifty batches.

    total: fused_moe with ``out`` given. compiled: FlashInfer's compiled runner alone, which launches the
    kernels. launches: of the kernel that pads before it and the copy that trims after it. python: what is left, ours to
    keep small. wrapper: FlashInfer's own function on the same call, for comparison. Only what applies is there.
    """
    device, p = layer.device, layer.prepared(kernel)
    call = make_call(body, tokens, "uniform", device, seed=0)
    out = torch.empty_like(call.x)
    run = partial(fused_moe, call.x, call.ids, call.weights, p, out=out)
    run()
    synchronize(device)
    found: dict[str, Any] = {"body": body.name, "tokens": tokens, "kernel": kernel, "total_us": time_host(run, device)}
    plan = p.plans.get((kernel, body.top_k))
    if isinstance(plan, Plan) and plan.direct is not None:
        found |= _parts(body, layer, kernel, plan, tokens)
        found["python_us"] = found["total_us"] - found["compiled_us"] - found["launches_us"]
    return {key: round(value, 2) if isinstance(value, float) else value for key, value in found.items()}


def _parts(body: Body, layer: Layer, kernel: str, plan: Plan, tokens: int) -> dict[str, float]:
    device, p = layer.device, layer.prepared(kernel)
    assert plan.direct is not None
    call = make_call(body, tokens, "uniform", device, seed=0)
    padded = p.w2.shape[1]
    x = torch.zeros(tokens, padded, dtype=torch.bfloat16, device=device)
    y = torch.empty_like(x)
    scratch = torch.empty(p.kernel.workspace_bytes(p, tokens, body.top_k), dtype=torch.uint8, device=device)
    pair = plan.pairs[0] if plan.pairs else (-1, -1)
    arguments = plan.direct.arguments.copy()
    for place, value in zip(plan.direct.places, (y, x, call.ids, call.weights, scratch, list(pair)), strict=True):
        arguments[place] = value
    launches: list[Callable[[], Any]] = []
    if device.type == "cuda" and (function := staging.load(device.index)):
        staged = call.ids.clone(), call.weights.clone()
        launches.append(staging.launch_of(function, call.x, call.ids, call.weights, body.experts, x, *staged).__call__)
    if padded != body.hidden:
        launches.append(partial(torch.empty_like(call.x).copy_, y[:, : body.hidden]))
    parts = {"compiled_us": time_host(partial(plan.direct.run, *arguments), device)}
    parts["launches_us"] = sum(time_host(launch, device) for launch in launches)
    if device.type == "cuda":
        parts["wrapper_us"] = time_host(STOCK["flashinfer-default"](layer)(call), device)
    return parts
