"""`config.json`: old and new spellings, values that are left out, and everything that is refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minilora import ConfigError
from minilora.models.config import FAMILIES, parse_config, trained_length
from minilora.models.qwen35 import is_linear
from minilora.models.smollm3 import rotated_layers
from tests import models
from tests.models import LLAMA3, SIZES, YARN, examples, tiny_config, tiny_model

ALL_KINDS = {
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": LLAMA3,
    "yarn": {"factor": 4.0, "beta_fast": 8.0},
}
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
MINIMAL = dict(zip(REQUIRED, (7, 64, 10, 30, 32), strict=True))


def read(**source):
    return parse_config(source)


def meaning(config):
    """A config without the text that it was read from; of its rotation, the table at short and long documents; and
    how long the documents of the training were.
    """
    fields = {name: value for name, value in vars(config).items() if name not in ("source", "rope")}
    spans = [range(n - 1, n) for n in (5, 40, 3000, 200_000)]
    tables = [table.tolist() for span in spans for table in config.rope.rotation([span], torch.device("cpu"))]
    return fields | {"rope": tables, "trained_length": trained_length(config)}


ROPES = [(f, kind) for f in sorted(FAMILIES.keys() - {"gemma3_text", "olmo3"}) for kind in ALL_KINDS]


@pytest.mark.parametrize(("family", "kind"), ROPES)
def test_rope_scaling_beside_rope_theta_means_what_rope_parameters_do(family, kind):
    common, numbers = {"model_type": family, "head_dim": 6, "partial_rotary_factor": 1.0}, ALL_KINDS[kind]
    new = tiny_config(**common, rope_parameters={"rope_type": kind, "rope_theta": 77_000.0, **numbers})
    plain = tiny_config(**common, rope_parameters={"rope_type": "default", "rope_theta": 77_000.0})
    assert (meaning(new) == meaning(plain)) == (kind == "default")
    assert meaning(new) != meaning(tiny_config(**common, rope_parameters={"rope_type": kind, **numbers}))
    for key in ("type", "rope_type"):
        old = tiny_config(**common, rope_scaling={key: kind, **numbers}, rope_theta=77_000.0)
        assert meaning(new) == meaning(old)


def test_gemma3_has_a_rotation_for_layers_with_a_window_and_another_for_the_rest():
    def rotations(**keys):
        return tiny_config("gemma3", **{"layer_types": None, "rope_parameters": None, **keys}).rope.ropes

    default, linear = {"rope_type": "default"}, {"rope_type": "linear", "factor": 8.0}
    new = {"sliding_attention": {**default, "rope_theta": 30.0}, "full_attention": {**linear, "rope_theta": 900.0}}
    old = {"rope_local_base_freq": 30.0, "rope_theta": 900.0, "rope_scaling": linear}
    assert rotations(rope_parameters=new) == rotations(**old)
    assert rotations(rope_parameters={"full_attention": linear}) == rotations(rope_scaling=linear)
    assert len({*rotations(**old), *rotations(**{**old, "rope_scaling": None}), *rotations()}) == 5
    for keys, message in (
        ({"rope_parameters": {**default, "rope_theta": 30.0}}, "rope_parameters: found"),
        ({"rope_parameters": new, "rope_scaling": linear}, "rope_parameters: found"),
        ({"rope_parameters": {"full_attention": {"rope_theta": "high"}}}, "full_attention: found"),
        ({"rope_parameters": {"full_attention": {"partial_rotary_factor": 0.5}}}, "full_attention: found"),
        ({"sliding_window": None}, "sliding_window: found None"),
    ):
        with pytest.raises(ConfigError, match=message):
            rotations(**keys)


def test_olmo3_has_yarn_where_it_has_no_window_and_one_theta_for_both_in_older_files():
    def rotations(**keys):
        return tiny_config("olmo3", **{"rope_parameters": None, **keys}).rope.ropes

    both = {"sliding_attention": {"rope_theta": 70.0}, "full_attention": {**YARN, "rope_theta": 70.0}}
    near, far = rotations(rope_parameters=both)
    assert (near, far) == rotations(rope_scaling=YARN, rope_theta=70.0)
    assert (near, near) == rotations(rope_theta=70.0)
    assert rotations()[0] == rotations(rope_theta=500_000.0)[0] == rotations(rope_scaling=YARN)[0] != near
    with pytest.raises(ConfigError, match="rope_parameters: found"):
        rotations(rope_parameters={**YARN, "rope_theta": 70.0})


def test_queries_of_ministral3_grow_from_the_length_that_yarn_extends():
    def factors(**keys):
        cos, _ = tiny_config("ministral3", **keys).rope.rotation([range(9)], torch.device("cpu"))
        return cos[:, -1].tolist()

    growing = factors()
    assert growing[:4] == [1.0] * 4 < growing[4:8] == [growing[4]] * 4 < growing[8:]
    rope = tiny_config("ministral3").source["rope_parameters"]
    assert factors(rope_parameters={**rope, "original_max_position_embeddings": 8}) == [1.0] * 8 + growing[4:5]
    assert factors(rope_parameters={**rope, "llama_4_scaling_beta": None}) == [1.0] * 9


def test_qwen3_5_attends_in_every_fourth_layer_or_where_its_config_says_so():
    for keys, linear in (
        ({"full_attention_interval": None}, [True, True, True, False]),
        ({}, [True, False, True, False]),
        ({"layer_types": ["full_attention", *["linear_attention"] * 3]}, [False, True, True, True]),
    ):
        model = tiny_model("qwen3.5", **keys)
        assert is_linear(model.config.source) == linear
        assert [hasattr(block, "linear_attn") for block in model.model.layers] == linear


@pytest.mark.parametrize("family", FAMILIES)
def test_a_key_that_is_null_is_as_if_it_was_left_out(family):
    """What that means is what it means to transformers: parity/test_models.py."""
    keys = ("max_position_embeddings", "rope_scaling", "rope_parameters", "layer_types", "no_rope_layers")
    nulls = read(model_type=family, **MINIMAL, **dict.fromkeys(keys), num_key_value_heads=None)
    assert nulls.num_key_value_heads == 32  # transformers: null is as many as there are heads, in every family
    assert meaning(nulls) == meaning(read(model_type=family, **MINIMAL, num_key_value_heads=32))


def test_biases_are_read_where_the_family_has_them():
    biases = {
        family: (config.qkv_bias, config.o_bias, config.mlp_bias)
        for family in FAMILIES
        for config in [tiny_config(model_type=family, attention_bias=True, mlp_bias=True)]
    }
    assert biases == {
        "llama": (True, True, True),
        "mistral": (False, False, False),
        "ministral3": (False, False, False),
        "qwen2": (True, False, False),
        "qwen3": (True, True, False),
        "qwen3_5_text": (True, True, False),
        "smollm3": (True, True, True),
        "olmo2": (True, True, False),
        "olmo3": (True, True, False),
        "gemma3_text": (True, True, False),
    }


ASKED = {"use_sliding_window": True, "sliding_window": 3}
MIXED = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
WINDOWS = [
    *((family, {**ASKED, "layer_types": MIXED}, (None, 3, 3, None)) for family in ("qwen2", "qwen3", "smollm3")),
    *((family, {"sliding_window": 3}, (None,) * 4) for family in ("qwen2", "qwen3", "smollm3")),  # not asked for
    *(("qwen3", {**ASKED, "max_window_layers": n}, (None,) * n + (3,) * (4 - n)) for n in (0, 3, 4)),
    ("smollm3", {"sliding_window": 3, "layer_types": MIXED}, (None, 3, 3, None)),
    ("smollm3", {**ASKED, "no_rope_layers": [1, 0, 0, 1, 0]}, (None, 3, 3, None)),  # where it does not rotate
    ("gemma3", {"layer_types": MIXED}, (None, 4, 4, None)),
    ("olmo3", {"layer_types": MIXED}, (None, 4, 4, None)),
    ("olmo3", {}, (4, 4, 4, None)),
    ("gemma3", {"layer_types": None, "sliding_window_pattern": 3}, (4, 4, None, 4)),  # all but every third
]


@pytest.mark.parametrize(("family", "keys", "windows"), WINDOWS)
def test_a_layer_has_a_window_where_the_config_says_so(family, keys, windows):
    assert tiny_config(family, **keys).windows == windows


def test_smollm3_rotates_where_its_config_says_so():
    assert rotated_layers(tiny_config("smollm3", no_rope_layers=[1, 0, 0, 1, 0]).source) == [True, False, False, True]
    for interval in (1, 2, 3):  # one of so many layers does not rotate
        config = tiny_config("smollm3", no_rope_layer_interval=interval)
        assert rotated_layers(config.source) == [i % interval != 0 for i in range(1, 5)]
    assert rotated_layers(read(model_type="smollm3", **MINIMAL).source) == [True, True, True, False] * 7 + [True, True]


def test_a_part_of_each_head_is_rotated():
    for key in ["partial_rotary_factor", "rope_parameters"]:
        value = 0.34 if key == "partial_rotary_factor" else {"rope_type": "default", "partial_rotary_factor": 0.34}
        assert len(tiny_config("qwen3.5", **{key: value}).rope.frequencies) == 2


def test_every_key_that_cannot_work_is_named_in_one_message():
    bad = {
        **dict.fromkeys(REQUIRED, 0),
        "num_key_value_heads": -2,
        "head_dim": 2.5,
        "max_position_embeddings": "long",
        "sliding_window": True,
        "rms_norm_eps": 0.0,
        "rope_theta": "large",
        "hidden_act": "gelu",
        "quantization_config": {"bits": 4},
    }
    with pytest.raises(ConfigError) as error:
        read(model_type="llama", **bad)
    assert [key for key in bad if f"\n  {key}: " not in str(error.value)] == []
    assert str(error.value).count("\n") == len(bad)
    for missing in REQUIRED:
        with pytest.raises(ConfigError, match=f"{missing}: found None"):
            parse_config({"model_type": "llama", **{k: v for k, v in SIZES.items() if k != missing}})
    for act in ("silu", "swish"):
        assert tiny_config("llama", hidden_act=act)


def test_what_does_not_fit_together_or_to_the_family_is_refused_by_name():
    for changes, message in (
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"model_type": "smollm3", "no_rope_layers": [1, 0]}, "no_rope_layers has 2 entries; the model has 4 layers"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "layer_types": ["full_attention"]},
            "layer_types has 1 entries; the model has 4 layers",
        ),
        ({"model_type": "qwen3_5_text", "linear_num_key_heads": 3}, "linear_num_value_heads 32 is not a multiple"),
        # what the family does not know
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"model_type": "ministral3", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"model_type": "gemma3_text", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"model_type": "qwen2", "rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"model_type": "mistral", "layer_types": ["full_attention"] * 4}, "layer_types"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings"),
        ({"attention_bias": "false"}, "attention_bias"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"model_type": "gemma3"}, "'gemma3' is not supported.*'gemma3_text'"),  # with its images
        *(({"model_type": other}, "llama.*smollm3") for other in ("gpt2", None, "Llama", ["llama"])),
        ({"model_type": "gemma3_text", "hidden_activation": "gelu"}, "activation: found 'gelu', .*tanh"),
    ):
        with pytest.raises(ConfigError, match=message):
            tiny_config(**{"model_type": "llama", **changes})


numbers = st.none() | st.booleans() | st.integers(-2, 9) | st.floats(allow_nan=True) | st.text("ab", max_size=2)
values = st.recursive(
    numbers, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("ab"), inner), max_leaves=4
)


@examples(4)
@given(st.data(), st.sampled_from(list(models.FAMILIES)), values, st.booleans())
def test_whatever_a_key_holds_is_used_or_refused_by_name(data, family, value, is_nested):
    source = {**SIZES, "rms_norm_eps": 1e-5, "rope_theta": 10.0, "layer_types": None, **models.FAMILIES[family]}
    spelling = "rope_scaling" if "rope_scaling" in source else "rope_parameters"
    rope = dict(source.pop(spelling, {"rope_type": "default"}))
    key = data.draw(st.sampled_from(sorted({*(rope if is_nested else source), "partial_rotary_factor", "rope_theta"})))
    (rope if is_nested else source)[key] = value
    refusal = key
    try:
        parse_config({spelling: rope} | source).rope.rotation([range(20)], torch.device("cpu"))
    except ConfigError as error:
        refusal = str(error).replace("rope type", "type")
    assert key.removeprefix("rope_") in refusal
