"""Bench's baselines: the layer is vLLM's, filled and called as vLLM would.

Its own GPU backends can't run here, so ours stands in for one.
"""

import pytest
import torch
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.quantization import mxfp4
from vllm.model_executor.layers.quantization.utils import quant_utils

import models
from hopper_mxfp4 import DEEPSEEK_V4, SwiGLU, reference_moe
from hopper_mxfp4.bench.baselines import Layer, contenders
from hopper_mxfp4.bench.workloads import make_batch, parse_workload, random_weights
from hopper_mxfp4.plugin import choose_kernel
from hopper_mxfp4_vllm import baselines
from hopper_mxfp4_vllm.configs import GptOssConfig
from hopper_mxfp4_vllm.layer import DeepseekV4Method


@pytest.fixture(autouse=True)
def _one_process_group():
    with set_current_vllm_config(baselines._config("auto")):
        models._one_process_group()


class Ours(mxfp4.Mxfp4Config):
    def get_quant_method(self, layer, prefix):
        if isinstance(layer, RoutedExperts):
            moe = layer.moe_config
            kernel = choose_kernel("auto", DeepseekV4Method.layer_shape(moe), models.DEVICE)
            return DeepseekV4Method(moe, DEEPSEEK_V4, SwiGLU(limit=10.0), kernel, models.DEVICE)
        return super().get_quant_method(layer, prefix)


@pytest.mark.parametrize("name", ["8,128,96,2,bias", "8,128,96,2"], ids=["gpt_oss", "deepseek_v4"])
def test_the_layer_computes_the_workload(name, monkeypatch):
    """96 is padded to 128 inside: the right corner must be filled, and gate and up apart."""
    monkeypatch.setattr(mxfp4, "GptOssMxfp4Config", GptOssConfig)
    monkeypatch.setattr(mxfp4, "Mxfp4Config", Ours)
    workload = parse_workload(name)
    layer = Layer(workload, random_weights(workload, models.DEVICE))
    call = make_batch(workload, 5, "uniform", models.DEVICE, 0)
    with torch.inference_mode():
        y = baselines.build("auto", layer)(call)()
    wanted = reference_moe(
        call.x,
        call.ids,
        call.weights,
        layer.weights,
        family=workload.family,
        swiglu=workload.swiglu,
    )
    assert (y[:, : workload.hidden].float() - wanted).norm() / wanted.norm() < 5e-3


def test_a_backend_that_cannot_run_says_why():
    if models.DEVICE.type == "cuda":
        pytest.skip("marlin runs on a GPU")
    workload = parse_workload("8,128,96,2,bias")
    with pytest.raises(ValueError, match="does not support"):
        baselines.build("marlin", Layer(workload, random_weights(workload, models.DEVICE)))


def test_no_bias():
    workload = parse_workload("gpt-oss-20b-tp8-nobias")
    with pytest.raises(NotImplementedError, match="always has biases"):
        baselines.build(
            "marlin", Layer(workload, random_weights(parse_workload("4,64,32,2"), models.DEVICE))
        )


def test_bench_finds_them():
    assert {"vllm-marlin", "vllm-triton", "vllm-humming"} <= {
        c.name for c in contenders(models.DEVICE)
    }


def test_the_8_bit_peer_declares_what_vllms_deepseek_v4_does(monkeypatch):
    """And is marked: a kernel that rounds activations to 8 bits is no baseline of one that does
    not.
    """
    found = {c.name: c.activations for c in contenders(models.DEVICE)}
    assert found["vllm-humming-fp8"] == "fp8"
    assert {found[f"vllm-{name}"] for name in ("marlin", "triton", "humming")} == {"bf16"}
    seen = []

    class Stopped(Exception):
        pass

    def method(moe, activation_key=None):
        seen.append(activation_key)
        raise Stopped

    monkeypatch.setattr(mxfp4, "Mxfp4MoEMethod", method)
    if not hasattr(quant_utils, "kMxfp8Dynamic"):
        pytest.skip("this vLLM knows no MXFP8 activations")
    workload = parse_workload("8,128,128,2")
    layer = Layer(workload, random_weights(workload, models.DEVICE))
    with pytest.raises(Stopped):
        baselines.build("auto", layer, declared="kMxfp8Dynamic")
    assert seen == [quant_utils.kMxfp8Dynamic]
    with pytest.raises(NotImplementedError, match="declare no activations"):
        baselines.build(
            "auto", Layer(parse_workload("8,128,128,2,bias"), layer.weights), "kMxfp8Dynamic"
        )
