"""Every way in which preparing can be refused: the message says what, where and what instead, and
nothing has changed.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from hopper_mxfp4 import (
    DEEPSEEK_V4,
    GPT_OSS,
    ExpertWeights,
    KernelUnavailable,
    LayerShape,
    SwiGLU,
    allocate_weights,
    env,
    prepare_experts,
)
from hopper_mxfp4 import registry as plugins
from hopper_mxfp4.checkpoint.weights import CHUNK_BYTES
from hopper_mxfp4.kernels.flashinfer import compat
from hopper_mxfp4.plugin import choose_kernel
from random_layers import bits, random_weights

pytestmark = pytest.mark.usefixtures("sm90_kernels")

CPU = torch.device("cpu")
Change = Callable[[ExpertWeights], ExpertWeights]


def swap(**changes: Callable[[torch.Tensor], Any]) -> Change:
    """A change of some fields, each from what it was."""
    return lambda w: replace(
        w, **{name: change(getattr(w, name)) for name, change in changes.items()}
    )


def put(name: str, where: tuple[int, ...], value: float) -> Change:
    """One element written into a field that is a tensor."""

    def change(w: ExpertWeights) -> ExpertWeights:
        getattr(w, name)[where] = value
        return w

    return change


def float_scale(name: str, where: tuple[int, ...], value: float) -> Change:
    """That scale tensor as float32 ones with one other value."""

    def change(w: ExpertWeights) -> ExpertWeights:
        scale = torch.ones(getattr(w, name).shape)
        scale[where] = value
        return replace(w, **{name: scale})

    return change


def to_meta(t: torch.Tensor) -> torch.Tensor:
    return t.to("meta")


# The layer that is spoilt: E=2, H=128, I=256, so that nothing needs padding and the SM90 kernel
# would work in place.
E, H, I = 2, 128, 256  # noqa: E741
OSS_CASES: dict[str, tuple[Change, list[str]]] = {
    "no tensor": (swap(w2=lambda t: t.tolist()), ["w2 is list", "give a torch.Tensor"]),
    "no scale": (swap(w13_scale=lambda t: None), ["w13_scale is NoneType", "give a torch.Tensor"]),
    "rank of w13": (swap(w13=lambda t: t[0]), ["w13 has shape [512, 64]", "give 3 dimensions"]),
    "rank of w2": (
        swap(w2=lambda t: t[None]),
        ["w2 has shape [1, 2, 128, 128]", "give 3 dimensions"],
    ),
    "rank of w13_scale": (
        swap(w13_scale=torch.flatten),
        ["w13_scale has shape [4096]", "give 3 dimensions"],
    ),
    "rank of w2_scale": (
        swap(w2_scale=lambda t: t[0]),
        ["w2_scale has shape [128, 8]", "give 3 dimensions"],
    ),
    "rank of w13_bias": (
        swap(w13_bias=lambda t: t[..., None]),
        ["w13_bias has shape [2, 512, 1]", "give 2 dimensions"],
    ),
    "rank of w2_bias": (
        swap(w2_bias=torch.flatten),
        ["w2_bias has shape [256]", "give 2 dimensions"],
    ),
    "dtype of w13": (
        swap(w13=torch.Tensor.short),
        ["w13 is torch.int16", "give torch.uint8 or torch.int8"],
    ),
    "dtype of w2": (
        swap(w2=torch.Tensor.bfloat16),
        ["w2 is torch.bfloat16", "give torch.uint8 or torch.int8"],
    ),
    "dtype of w13_scale": (
        swap(w13_scale=torch.Tensor.bfloat16),
        [
            "w13_scale is torch.bfloat16",
            "give torch.uint8 or torch.float8_e8m0fnu or torch.float32",
        ],
    ),
    "dtype of w2_scale": (
        swap(w2_scale=lambda t: t.view(torch.int8)),
        ["w2_scale is torch.int8", "give torch.uint8 or torch.float8_e8m0fnu or torch.float32"],
    ),
    "dtype of w13_bias": (
        swap(w13_bias=torch.Tensor.float),
        ["w13_bias is torch.float32", "give torch.bfloat16"],
    ),
    "dtype of w2_bias": (
        swap(w2_bias=torch.Tensor.half),
        ["w2_bias is torch.float16", "give torch.bfloat16"],
    ),
    "no experts": (
        lambda w: replace(w, **{name: t[:0] for name, t in w.tensors().items()}),
        ["w13 has shape [0, 512, 64]", "give at least one local expert"],
    ),
    "hidden size of 112": (
        swap(w13=lambda t: t[:, :, :56]),
        ["w13 has shape [2, 512, 56]", "hidden size 112", "multiple of 32"],
    ),
    "hidden size of 0": (
        swap(w13=lambda t: t[:, :, :0]),
        ["w13 has shape [2, 512, 0]", "hidden size 0", "positive multiple of 32"],
    ),
    "intermediate size of 240": (
        swap(w13=lambda t: t[:, :480]),
        ["w13 has 480 rows", "intermediate size 240", "multiple of 32"],
    ),
    "odd rows": (
        swap(w13=lambda t: t[:, :511]),
        ["w13 has 511 rows", "intermediate size 255.5", "multiple of 32"],
    ),
    "no rows": (
        swap(w13=lambda t: t[:, :0]),
        ["w13 has 0 rows", "intermediate size 0", "positive multiple of 32"],
    ),
    "w2 of another hidden size": (
        swap(w2=lambda t: t[:, :96]),
        ["w2 has shape [2, 96, 128]", "w13 of shape [2, 512, 64] wants [2, 128, 128]"],
    ),
    "w2 of another intermediate size": (
        swap(w2=lambda t: t[:, :, :64]),
        ["w2 has shape [2, 128, 64]", "wants [2, 128, 128]"],
    ),
    "w2 of fewer experts": (
        swap(w2=lambda t: t[:1]),
        ["w2 has shape [1, 128, 128]", "wants [2, 128, 128]"],
    ),
    "w13 and w2 exchanged": (
        lambda w: replace(w, w13=w.w2, w2=w.w13),
        ["w2 has shape [2, 512, 64]", "w13 of shape [2, 128, 128] wants [2, 256, 32]"],
    ),
    "w13_scale per 16": (
        swap(w13_scale=lambda t: t.repeat_interleave(2, dim=2)),
        ["w13_scale has shape [2, 512, 8]", "w13 of shape [2, 512, 64] wants [2, 512, 4]"],
    ),
    "w2_scale transposed": (
        swap(w2_scale=lambda t: t.transpose(1, 2)),
        ["w2_scale has shape [2, 8, 128]", "wants [2, 128, 8]"],
    ),
    "w13_bias of one half": (
        swap(w13_bias=lambda t: t[:, :256]),
        ["w13_bias has shape [2, 256]", "wants [2, 512]"],
    ),
    "w2_bias of fewer experts": (
        swap(w2_bias=lambda t: t[:1]),
        ["w2_bias has shape [1, 128]", "wants [2, 128]"],
    ),
    "w13_bias missing": (
        swap(w13_bias=lambda t: None),
        ["w13_bias is missing", "gpt_oss", "give both"],
    ),
    "w2_bias missing": (
        swap(w2_bias=lambda t: None),
        ["w2_bias is missing", "gpt_oss", "give both"],
    ),
    "w13_scale NaN": (
        put("w13_scale", (1, 500, 3), 255),
        ["w13_scale[1, 500, 3] is 255", "NaN", "give a byte from 0 to 254"],
    ),
    "w2_scale NaN": (
        put("w2_scale", (0, 127, 7), 255),
        ["w2_scale[0, 127, 7] is 255", "NaN", "give a byte from 0 to 254"],
    ),
    "float8 scale NaN": (
        lambda w: swap(w2_scale=lambda t: t.view(torch.float8_e8m0fnu))(
            put("w2_scale", (1, 2, 3), 255)(w)
        ),
        ["w2_scale[1, 2, 3] is 255", "NaN", "give a byte from 0 to 254"],
    ),
    "scale of 3": (
        float_scale("w13_scale", (1, 0, 2), 3.0),
        ["w13_scale[1, 0, 2] is 3.0", "power of two from 2**-127 to 2**127"],
    ),
    "scale of 0": (
        float_scale("w2_scale", (0, 5, 2), 0.0),
        ["w2_scale[0, 5, 2] is 0.0", "power of two"],
    ),
    "scale of -0": (
        float_scale("w2_scale", (0, 5, 2), -0.0),
        ["w2_scale[0, 5, 2] is -0.0", "power of two"],
    ),
    "scale of -2": (
        float_scale("w2_scale", (1, 5, 2), -2.0),
        ["w2_scale[1, 5, 2] is -2.0", "power of two"],
    ),
    "scale of nan": (
        float_scale("w2_scale", (1, 5, 2), float("nan")),
        ["w2_scale[1, 5, 2] is nan", "power of two"],
    ),
    "scale of inf": (
        float_scale("w2_scale", (1, 5, 2), float("inf")),
        ["w2_scale[1, 5, 2] is inf", "power of two"],
    ),
    "scale of 2**-128": (
        float_scale("w2_scale", (1, 5, 2), 2.0**-128),
        [f"w2_scale[1, 5, 2] is {2.0**-128}", "power of two"],
    ),
    "scale near 1": (
        float_scale("w2_scale", (1, 5, 2), 1 + 2.0**-23),
        [f"w2_scale[1, 5, 2] is {1 + 2.0**-23}", "power of two"],
    ),
    "bias NaN": (
        put("w13_bias", (1, 511), float("nan")),
        ["w13_bias[1, 511] is nan", "give finite"],
    ),
    "bias inf": (put("w2_bias", (0, 3), float("inf")), ["w2_bias[0, 3] is inf", "give finite"]),
    "bias -inf": (put("w2_bias", (1, 0), float("-inf")), ["w2_bias[1, 0] is -inf", "give finite"]),
    "w2 elsewhere": (swap(w2=to_meta), ["w2 is on meta", "w13 on cpu", "one device"]),
    "w13 elsewhere": (swap(w13=to_meta), ["w2 is on cpu", "w13 on meta", "one device"]),
    "w2_scale elsewhere": (
        swap(w2_scale=to_meta),
        ["w2_scale is on meta", "w13 on cpu", "one device"],
    ),
    "w13_bias elsewhere": (
        swap(w13_bias=to_meta),
        ["w13_bias is on meta", "w13 on cpu", "one device"],
    ),
    "true hidden size of 100": (
        lambda w: replace(w, hidden_size=100),
        ["hidden_size is 100", "multiple of 32 up to the 128"],
    ),
    "true hidden size of 0": (
        lambda w: replace(w, hidden_size=0),
        ["hidden_size is 0", "positive multiple of 32 up to the 128"],
    ),
    "true hidden size too large": (
        lambda w: replace(w, hidden_size=160),
        ["hidden_size is 160", "multiple of 32 up to the 128"],
    ),
    "true intermediate size of -32": (
        lambda w: replace(w, intermediate_size=-32),
        ["intermediate_size is -32", "32 up to the 256"],
    ),
    "true intermediate size too large": (
        lambda w: replace(w, intermediate_size=288),
        ["intermediate_size is 288", "32 up to the 256"],
    ),
}
DEEPSEEK_CASES: dict[str, tuple[Change, list[str]]] = {
    "w13_bias given": (
        lambda w: replace(w, w13_bias=torch.zeros(E, 2 * I, dtype=torch.bfloat16)),
        ["w13_bias is given", "deepseek_v4 experts have no bias", "leave it None"],
    ),
    "w2_bias given": (
        lambda w: replace(w, w2_bias=torch.zeros(E, H, dtype=torch.bfloat16)),
        ["w2_bias is given", "deepseek_v4 experts have no bias", "leave it None"],
    ),
    "w13_scale of 3": (
        float_scale("w13_scale", (0, 511, 0), 3.0),
        ["w13_scale[0, 511, 0] is 3.0", "power of two"],
    ),
}


def refused(w: ExpertWeights, error: type[Exception], parts: list[str], **call: Any) -> None:
    """The call raises with all these parts in one line, and every byte of w is what it was."""
    tensors = {name: t for name, t in w.tensors().items() if t.device == CPU}
    before = {name: t.clone() for name, t in tensors.items()}
    with pytest.raises(error) as caught:
        prepare_experts(w, **({"swiglu": SwiGLU(), "kernel": "sm90-folded"} | call))
    assert not w.consumed
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
    for name, t in tensors.items():
        assert torch.equal(bits(t), bits(before[name])), name


@pytest.mark.parametrize("case", list(OSS_CASES))
def test_bad_gpt_oss_weights(case) -> None:
    change, parts = OSS_CASES[case]
    refused(change(random_weights(GPT_OSS, E, H, I)), ValueError, parts, family=GPT_OSS)


@pytest.mark.parametrize("case", list(DEEPSEEK_CASES))
def test_bad_deepseek_v4_weights(case) -> None:
    change, parts = DEEPSEEK_CASES[case]
    refused(change(random_weights(DEEPSEEK_V4, E, H, I)), ValueError, parts, family=DEEPSEEK_V4)


def test_the_spoilt_layer_was_good() -> None:
    """And preparing does write into it: the comparisons of bytes above can fail."""
    w = random_weights(GPT_OSS, E, H, I)
    before = {name: t.clone() for name, t in w.tensors().items()}
    prepare_experts(w, family=GPT_OSS, swiglu=SwiGLU(), kernel="sm90-folded")
    assert [
        name for name, t in w.tensors().items() if torch.equal(bits(t), bits(before[name]))
    ] == ["w2_bias"]


def test_a_bad_scale_late_in_a_large_layer() -> None:
    """Checks go through the experts in parts; the place named must be that in the whole tensor."""
    w = random_weights(DEEPSEEK_V4, 5, 4096, 8192)
    w = replace(w, w13_scale=torch.ones(w.w13_scale.shape))
    assert w.w13_scale[:3].nbytes > CHUNK_BYTES
    w.w13_scale[3, 9, 11] = 0.75
    refused(w, ValueError, ["w13_scale[3, 9, 11] is 0.75"], family=DEEPSEEK_V4)


def test_float_scales_from_end_to_end_are_good() -> None:
    """The neighbours of what is refused above: 2**-127, a subnormal, and 2**127."""
    w = random_weights(DEEPSEEK_V4, 1, H, I, scale_dtype=torch.float32)
    w.w2_scale[0, 0, 0], w.w2_scale[0, 0, 1] = 2.0**-127, 2.0**127
    p = prepare_experts(w, family=DEEPSEEK_V4, swiglu=SwiGLU(), kernel="reference")
    assert p.w2_scale[0, 0, :2].tolist() == [0, 254]


def test_unknown_kernel() -> None:
    parts = ["'marlin'", "auto", "flashinfer", "reference", "sm90-folded"]
    refused(random_weights(GPT_OSS, E, H, I), ValueError, parts, family=GPT_OSS, kernel="marlin")
    with pytest.raises(ValueError, match="'marlin'"):
        choose_kernel("marlin", LayerShape(E, H, I), CPU)
    with pytest.raises(ValueError, match="'marlin'"):
        allocate_weights(LayerShape(E, H, I), family=GPT_OSS, device="cpu", kernel="marlin")


def test_flashinfer_on_a_cpu() -> None:
    parts = ["flashinfer", "Hopper GPU", "on cpu", "move"]
    refused(
        random_weights(GPT_OSS, E, H, I),
        KernelUnavailable,
        parts,
        family=GPT_OSS,
        kernel="flashinfer",
    )
    with pytest.raises(KernelUnavailable, match=r"flashinfer .*Hopper GPU"):
        allocate_weights(LayerShape(E, H, I), family=GPT_OSS, device="cpu", kernel="flashinfer")


def test_a_device_without_a_kernel() -> None:
    with pytest.raises(
        KernelUnavailable, match=r"no kernel is meant for meta tensors; .*Hopper GPU or the CPU"
    ):
        choose_kernel("auto", LayerShape(E, H, I), torch.device("meta"))


def test_weights_without_data() -> None:
    """A framework's model built on the meta device has nothing to check or repack; torch's own
    error would not say so.
    """
    w = random_weights(GPT_OSS, E, H, I)
    w = replace(w, **{name: t.to("meta") for name, t in w.tensors().items()})
    with pytest.raises((ValueError, KernelUnavailable), match="meta"):
        prepare_experts(w, family=GPT_OSS, swiglu=SwiGLU())


def test_auto_gives_every_reason(monkeypatch) -> None:
    """Where all candidates refuse, each one's own words are in the message."""
    candidates = {}
    for name in ("one", "two"):
        candidates[name] = type(
            name,
            (),
            {
                "name": name,
                "auto_devices": {"cpu"},
                "activations": {"bf16"},
                "unsupported_reason": lambda self, *args: f"{self.name} is off",
            },
        )()
    monkeypatch.setattr("hopper_mxfp4.kernels.select.kernels", lambda: candidates)
    with pytest.raises(
        KernelUnavailable,
        match="kernel one can't run: one is off; kernel two can't run: two is off",
    ):
        choose_kernel("auto", LayerShape(E, H, I), CPU)
    candidates["two"].unsupported_reason = lambda *args: None
    assert choose_kernel("auto", LayerShape(E, H, I), CPU) is candidates["two"]


def test_auto_on_a_cpu_and_its_replacement(monkeypatch) -> None:
    assert choose_kernel("auto", LayerShape(E, H, I), CPU).name == "reference"
    monkeypatch.setenv("HOPPER_MXFP4_KERNEL", "sm90-by_k")
    assert choose_kernel("auto", LayerShape(E, H, I), CPU).name == "sm90-by_k"
    assert choose_kernel("reference", LayerShape(E, H, I), CPU).name == "reference", (
        "a kernel asked for by name stays"
    )
    monkeypatch.setenv("HOPPER_MXFP4_KERNEL", "")
    assert choose_kernel("auto", LayerShape(E, H, I), CPU).name == "reference"


def test_bad_kernel_variable(monkeypatch) -> None:
    """The user typed the variable, not a kernel argument, so the message has to name the
    variable.
    """
    monkeypatch.setenv("HOPPER_MXFP4_KERNEL", "marlin")
    parts = ["'marlin'", "reference", "HOPPER_MXFP4_KERNEL"]
    refused(random_weights(GPT_OSS, E, H, I), ValueError, parts, family=GPT_OSS, kernel="auto")


def test_kernel_variable_that_cannot_serve(monkeypatch) -> None:
    monkeypatch.setenv("HOPPER_MXFP4_KERNEL", "flashinfer")
    refused(
        random_weights(GPT_OSS, E, H, I),
        KernelUnavailable,
        ["flashinfer", "on cpu"],
        family=GPT_OSS,
        kernel="auto",
    )


def test_bad_determinism_variable(monkeypatch) -> None:
    monkeypatch.setenv("HOPPER_MXFP4_DETERMINISTIC", "yes")
    parts = ["HOPPER_MXFP4_DETERMINISTIC='yes'", "0, 1", "unset"]
    refused(random_weights(GPT_OSS, E, H, I), ValueError, parts, family=GPT_OSS)


def test_bad_flashinfer_variable(monkeypatch) -> None:
    from packaging.version import Version

    monkeypatch.setattr(compat, "flashinfer_version", lambda: Version("0.6.17"))
    monkeypatch.setenv("HOPPER_MXFP4_ALLOW_UNSAFE_FLASHINFER", "true")
    with pytest.raises(
        ValueError, match="HOPPER_MXFP4_ALLOW_UNSAFE_FLASHINFER='true' is not one of 0, 1"
    ):
        compat.flashinfer_problem()


@pytest.mark.parametrize("variable", [v for v in env.VARIABLES if v.choices], ids=lambda v: v.name)
def test_variables_with_choices(variable, monkeypatch) -> None:
    """Read when asked, whatever the case; unset and empty mean the default; anything else is
    refused by name.
    """
    assert variable.read() == variable.default
    monkeypatch.setenv(variable.name, "")
    assert variable.read() == variable.default
    for choice in variable.choices:
        monkeypatch.setenv(variable.name, choice.upper())
        assert variable.read() == choice
        assert variable.enabled() == (choice == "1")
    monkeypatch.setenv(variable.name, "Maybe")
    with pytest.raises(
        ValueError, match=f"{variable.name}='maybe' is not one of {', '.join(variable.choices)}"
    ):
        variable.read()


def test_kernel_names_come_from_one_place() -> None:
    """Guards this file: the names it uses are those registered."""
    assert {"flashinfer", "reference", "sm90-folded", "sm90-by_k"} <= plugins.kernels().keys()
