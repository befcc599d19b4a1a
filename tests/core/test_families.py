"""Which checkpoint family a model belongs to, and which activation its config asks for."""

from types import SimpleNamespace

import pytest

from hopper_mxfp4 import DEEPSEEK_V4, GPT_OSS, CheckpointFamily, SwiGLU, family_for
from hopper_mxfp4.plugin import hookimpl


def as_object(config: dict) -> SimpleNamespace:
    return SimpleNamespace(**config)


both_forms = pytest.mark.parametrize("form", [dict, as_object], ids=["dict", "object"])


@both_forms
@pytest.mark.parametrize(
    ("model_type", "family"),
    [
        ("gpt_oss", GPT_OSS),
        ("deepseek_v4", DEEPSEEK_V4),
        ("deepseek_v4_text", DEEPSEEK_V4),
        ("deepseek_v41", DEEPSEEK_V4),
        ("deepseek_v41_text", DEEPSEEK_V4),
        ("deepseek_mtp", DEEPSEEK_V4),
    ],
)
def test_model_types(form, model_type, family) -> None:
    assert family_for(form({"model_type": model_type})) is family


@both_forms
@pytest.mark.parametrize(
    "config",
    [{"model_type": "mixtral"}, {"model_type": None}, {}, {"model_type": "GPT_OSS"}],
    ids=str,
)
def test_unknown_model_types(form, config) -> None:
    """The message says what was seen and all that would do."""
    with pytest.raises(ValueError, match="no checkpoint family for model_type") as caught:
        family_for(form(config))
    for part in (repr(config.get("model_type")), "deepseek_mtp, deepseek_v4, ", "gpt_oss"):
        assert part in str(caught.value)
    with pytest.raises(ValueError, match="no checkpoint family for model_type"):
        SwiGLU.from_config(form(config))


def test_a_registered_family_is_found_and_named(registered) -> None:
    mine = CheckpointFamily(
        "mine",
        ("mine_moe", "mine_moe_2"),
        rows="gate_up",
        bias=True,
        alpha=2.0,
        beta=0.5,
        limit=3.0,
    )

    class Plugin:
        @hookimpl
        def register_families(self, register) -> None:
            register(mine)

    with registered(Plugin()):
        assert family_for({"model_type": "mine_moe_2"}) is mine
        assert SwiGLU.from_config({"model_type": "mine_moe"}) == SwiGLU(2.0, 0.5, 3.0)
        with pytest.raises(ValueError, match=r"known are .*mine_moe, mine_moe_2"):
            family_for({"model_type": "other"})
    with pytest.raises(ValueError, match="'mine_moe_2'"):
        family_for({"model_type": "mine_moe_2"})


@both_forms
@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({"model_type": "gpt_oss", "swiglu_limit": 7.0}, SwiGLU(1.702, 1.0, 7.0)),
        ({"model_type": "gpt_oss", "swiglu_limit": 5.5}, SwiGLU(1.702, 1.0, 5.5)),
        ({"model_type": "gpt_oss", "swiglu_alpha": 1.5}, SwiGLU(1.5, 1.0, 7.0)),
        ({"model_type": "gpt_oss", "swiglu_alpha": None}, SwiGLU(1.702, 1.0, 7.0)),
        ({"model_type": "gpt_oss"}, SwiGLU(1.702, 1.0, 7.0)),
        ({"model_type": "gpt_oss", "swiglu_limit": None}, SwiGLU(1.702, 1.0, 7.0)),
        ({"model_type": "deepseek_v4", "swiglu_limit": 10.0}, SwiGLU(1.0, 0.0, 10.0)),
        ({"model_type": "deepseek_v4", "swiglu_limit": 10}, SwiGLU(1.0, 0.0, 10.0)),
        ({"model_type": "deepseek_v4"}, SwiGLU(1.0, 0.0, None)),
        ({"model_type": "deepseek_v4", "swiglu_limit": None}, SwiGLU(1.0, 0.0, None)),
        ({"model_type": "deepseek_v4", "swiglu_limit": 0}, SwiGLU(1.0, 0.0, None)),
        ({"model_type": "deepseek_v4", "swiglu_limit": 0.0}, SwiGLU(1.0, 0.0, None)),
        ({"model_type": "deepseek_mtp", "swiglu_limit": 10.0}, SwiGLU(1.0, 0.0, 10.0)),
    ],
    ids=str,
)
def test_activation_from_config(form, config, wanted) -> None:
    assert SwiGLU.from_config(form(config)) == wanted


@both_forms
def test_a_bad_limit_in_a_config(form) -> None:
    with pytest.raises(ValueError, match=r"SwiGLU limit is -1\.0"):
        SwiGLU.from_config(form({"model_type": "deepseek_v4", "swiglu_limit": -1.0}))


def test_configs_of_transformers() -> None:
    """The real classes, whose attributes may be renamed or defaulted."""
    transformers = pytest.importorskip("transformers")
    assert family_for(transformers.GptOssConfig()) is GPT_OSS
    assert SwiGLU.from_config(transformers.GptOssConfig()) == SwiGLU(1.702, 1.0, 7.0)
    assert family_for(transformers.DeepseekV4Config()) is DEEPSEEK_V4
    assert SwiGLU.from_config(transformers.DeepseekV4Config()) == SwiGLU(1.0, 0.0, 10.0)


def test_what_the_families_are() -> None:
    """Facts about published checkpoints, which nothing in this package may change."""
    assert (GPT_OSS.name, GPT_OSS.rows, GPT_OSS.bias) == ("gpt_oss", "interleaved", True)
    assert (DEEPSEEK_V4.name, DEEPSEEK_V4.rows, DEEPSEEK_V4.bias) == (
        "deepseek_v4",
        "gate_up",
        False,
    )
