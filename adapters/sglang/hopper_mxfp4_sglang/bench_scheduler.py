"""What `hopper-mxfp4 bench --engine sglang` needs inside of each of an engine's schedulers.

SGLang starts them anew, one for each GPU, with `run_scheduler` in place of its own function.
"""

import json
import os
import zlib
from pathlib import Path
from typing import Any

import torch

FILL = "sglang.srt.model_loader.loader.initialize_dummy_weights"
READY = "sglang.srt.managers.scheduler.Scheduler.get_init_info"


def run_scheduler(folder: str, *args: Any, **kwargs: Any) -> None:
    """SGLang's scheduler, with `fill` in place of its dummy weights and a report in the folder."""
    from sglang.srt.managers.scheduler import run_scheduler_process
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from hopper_mxfp4 import env

    from . import register

    def report(info: Any, scheduler: Any) -> None:
        path = Path(folder, f"{os.getpid()}.json")
        path.write_text(json.dumps(report_of(scheduler)))

    if env.MODE.read() != "off":
        register()  # where the package is on the path and not installed, SGLang finds no plugin
    HookRegistry.register(FILL, fill, HookType.REPLACE)
    HookRegistry.register(READY, report, HookType.AFTER)
    run_scheduler_process(*args, **kwargs)


def report_of(scheduler: Any) -> dict[str, Any]:
    """What a scheduler's process alone knows once it is ready.

    methods: what serves its MoE layers, by how many. kv_cache_tokens: for which it has room.
    """
    return {
        "methods": methods_of(scheduler.tp_worker.model_runner.model),
        "kv_cache_tokens": int(scheduler.max_total_num_tokens),
    }


def methods_of(model: torch.nn.Module) -> dict[str, int]:
    """What serves a model's MoE layers, by how many."""
    from sglang.srt.layers.moe.fused_moe_triton import FusedMoE

    found: dict[str, int] = {}
    for module in model.modules():
        if not isinstance(module, FusedMoE):
            continue
        prepared = getattr(module.quant_method, "prepared", None)
        backend = getattr(module, "runner_backend", None)
        served = prepared.kernel.name if prepared else getattr(backend, "value", backend)
        name = f"{type(module.quant_method).__name__} {served}"
        found[name] = found.get(name, 0) + 1
    return found


def fill(model: torch.nn.Module, *_: Any, **__: Any) -> None:
    """Weights that keep activations of order one and route evenly; random bits for the experts.

    SGLang's own dummy weights leave experts as their memory was, and are so small that a router's
    bias decides: every token goes to the same experts. What every rank holds is the same on all of
    them, as the router must be.
    """
    for name, parameter in model.named_parameters():
        t = parameter.data
        if t.dim() == 0:
            continue  # a scale of the KV cache, which says by its value that none was loaded
        # Of each parameter anew, since ranks may have different numbers of those before it.
        g = torch.Generator(t.device).manual_seed(zlib.crc32(name.encode()))
        if t.dtype in (torch.uint8, torch.int8, torch.float8_e8m0fnu):
            low, high = (118, 122) if "scale" in name else (0, 256)
            t.view(torch.uint8).random_(low, high, generator=g)
        elif t.dtype == torch.float8_e4m3fn:
            t.copy_(torch.empty(t.shape, device=t.device).normal_(0, 1, generator=g))
        elif "norm" in name:
            t.fill_(1)
        elif "scale_inv" in name:
            t.fill_(2.0**-6)  # of weights of order one
        elif t.is_floating_point():
            t.normal_(0, 1.0 if "embed" in name else 0.02, generator=g)
