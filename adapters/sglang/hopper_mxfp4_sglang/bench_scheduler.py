"""What `hopper-mxfp4 bench --engine sglang` needs inside of each of an engine's schedulers.

SGLang starts them anew, one for each GPU, with `run_scheduler` in place of its own function.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch

from hopper_mxfp4.bench.random_model import fill_parameters

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
    """In place of SGLang's own dummy weights, which leave experts as their memory was and are so
    small that a router's bias decides.
    """
    fill_parameters(model)
