"""An SGLang plugin for run.py: what loading took, each expert layer's method, our kernel's calls.

It writes them to a file of this process in the folder that the variable PROBE names, anew every
half second, because run.py ends the servers with a signal.
"""

import json
import os
import threading
import time
from pathlib import Path

LOAD = (
    "sglang.srt.model_executor.model_runner_components.load_model_utils"
    ".load_model_with_memory_saver"
)


def register() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(LOAD, load, HookType.AROUND)


def load(original, *args, **kwargs):
    import torch

    from hopper_mxfp4.cli.demo import CALLS, count_calls

    count_calls()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    before, start = torch.cuda.memory_allocated(), time.time()
    loaded = original(*args, **kwargs)
    found: dict = {
        "load_s": round(time.time() - start, 2),
        "peak_gib": round((torch.cuda.max_memory_allocated() - before) / 2**30, 3),
        "kept_gib": round((torch.cuda.memory_allocated() - before) / 2**30, 3),
        "layers": {},
    }
    for module in loaded.model.modules():
        if type(module).__name__ == "FusedMoE":
            backend = getattr(module, "runner_backend", None)
            name = f"{type(module.quant_method).__name__} {getattr(backend, 'value', backend)}"
            if prepared := getattr(module.quant_method, "prepared", None):
                name += f" {prepared.kernel.name}"
            found["layers"][name] = found["layers"].get(name, 0) + 1

    def write() -> None:
        path = Path(os.environ["PROBE"]) / f"{os.getpid()}.json"
        while True:
            path.with_suffix(".new").write_text(json.dumps(found | {"calls": dict(CALLS)}))
            path.with_suffix(".new").rename(path)
            time.sleep(0.5)

    threading.Thread(target=write, daemon=True).start()
    return loaded
