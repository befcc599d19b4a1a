"""What importing and using the core costs and brings along, in a process of its own."""

import json
import subprocess
import sys
import textwrap

FOREIGN = ("vllm", "sglang", "flashinfer", "transformers")
ADAPTERS = ("hopper_mxfp4_vllm", "hopper_mxfp4_sglang")  # come as plugins, when they are asked for

IMPORT = f"""
    import json, sys, time
    import torch

    start = time.perf_counter()
    import hopper_mxfp4
    seconds = time.perf_counter() - start
    foreign = [name for name in {FOREIGN + ADAPTERS} if name in sys.modules]
    cuda = torch.cuda.is_initialized()
    print(json.dumps({{"seconds": seconds, "foreign": foreign, "cuda": cuda}}))
"""

# Everything a framework-free user does, with the foreign modules made impossible to import.
USE = f"""
    import sys

    class Refuse:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in {FOREIGN}:
                raise AssertionError(f"the core imports {{name}}")

    sys.meta_path.insert(0, Refuse())
    import torch
    from hopper_mxfp4 import *

    from hopper_mxfp4 import env, plugin, registry
    from hopper_mxfp4.kernels.flashinfer import compat, kernel

    shape = LayerShape(2, 64, 32)
    w = allocate_weights(shape, family=GPT_OSS, device="cpu")
    config = {{"model_type": "gpt_oss"}}
    p = prepare_experts(w, family=family_for(config), swiglu=SwiGLU.from_config(config))
    x, ids = torch.ones(1, 64, dtype=torch.bfloat16), torch.zeros(1, 1, dtype=torch.int64)
    fused_moe(x, ids, torch.ones(1, 1), p)
    reference_moe(x, ids, torch.ones(1, 1), restore_weights(p), family=GPT_OSS, swiglu=SwiGLU())
    registry.adapters()
    foreign = [name for name in {FOREIGN} if name in sys.modules]
    assert not foreign, foreign
    assert not torch.cuda.is_initialized()
    print("used")
"""


def run(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()[-1]


def test_importing_is_light() -> None:
    """No framework, no FlashInfer, no CUDA, under a second beyond torch; a busy machine gets a
    second and a third try.
    """
    for _ in range(3):
        seen = json.loads(run(IMPORT))
        assert seen["foreign"] == []
        assert seen["cuda"] is False
        if seen["seconds"] < 1:
            break
    assert seen["seconds"] < 1


def test_using_it_needs_nothing_foreign() -> None:
    assert run(USE) == "used"


def test_this_suite_cannot_import_a_framework() -> None:
    """Guards conftest.py."""
    for name in ("vllm", "sglang", "flashinfer"):
        assert sys.modules[name] is None
