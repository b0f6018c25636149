import pytest

from minilora import ConfigError, LoraConfig, TargetError
from minilora.lora.config import select_targets

LINEARS = [f"model.layers.{i}.{name}" for i in range(12) for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up")]
LINEARS += ["model.experts.1.layers.0.up", "lm_head"]


def chosen(**fields):
    return select_targets(LINEARS, LoraConfig(**fields), head="lm_head")


# name, fields -> how many of LINEARS are meant, or which
RULES = {
    "all linears but the head": ({}, LINEARS[:-1]),
    "whatever its case": ({"target_modules": "All-Linear"}, LINEARS[:-1]),
    "the end of a path, after a dot": ({"target_modules": ["q_proj"]}, [p for p in LINEARS if p.endswith("q_proj")]),
    "never a part of a name": ({"target_modules": ["up"]}, [p for p in LINEARS if p.endswith(".up")]),
    "several components": ({"target_modules": ["1.mlp.up"]}, ["model.layers.1.mlp.up"]),  # and not layer 11
    "a whole path": ({"target_modules": ["lm_head"]}, ["lm_head"]),
    "a string is a regex for the whole path": (
        {"target_modules": r".*\.(q|v)_proj"},
        [p for p in LINEARS if "_proj" in p],
    ),
    "excluded by name": (
        {"target_modules": ["q_proj", "up"], "exclude_modules": ["up"]},
        [p for p in LINEARS if p.endswith("q_proj")],
    ),
    "excluded by regex": (
        {"exclude_modules": r".*layers\.\d+\..*|.*experts.*", "target_modules": ["lm_head", "up"]},
        ["lm_head"],
    ),
    "layers by the first number": (
        {"target_modules": ["q_proj", "up"], "layers_to_transform": [1]},
        ["model.layers.1.self_attn.q_proj", "model.layers.1.mlp.up", "model.experts.1.layers.0.up"],
    ),
    "layers by a named list": (
        {"target_modules": ["up"], "layers_to_transform": 0, "layers_pattern": "layers"},
        ["model.layers.0.mlp.up", "model.experts.1.layers.0.up"],
    ),
    "layers hold for full paths too": (
        {"target_modules": ["model.layers.1.mlp.up", "model.layers.2.mlp.up"], "layers_to_transform": [2]},
        ["model.layers.2.mlp.up"],
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_target_modules_means(rule):
    fields, expected = RULES[rule]
    assert sorted(chosen(**fields)) == sorted(expected)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj", "qq_proj"]},  # also where another entry matches
        {"target_modules": "q_proj"},  # a regex must match the whole path
        {"target_modules": ["proj"]},
        {"target_modules": ["q_proj"], "exclude_modules": ["k_proj"]},
        {"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]},
        {"target_modules": ["q_proj"], "rank_pattern": {"v_proj": 2}},
        {"target_modules": ["q_proj"], "alpha_pattern": {"layers.99.self_attn.q_proj": 2}},
        {"target_modules": ["q_proj"], "layers_to_transform": [99]},
        {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [0, 99]},
        {"target_modules": []},
    ],
)
def test_what_matches_nothing_is_an_error_that_lists_what_there_is(fields):
    with pytest.raises(TargetError, match=r"\['lm_head', 'q_proj', 'up', 'v_proj'\]"):
        chosen(**fields)


def test_the_first_key_of_a_pattern_that_matches_counts():
    config = LoraConfig(
        r=8,
        lora_alpha=16,
        rank_pattern={"layers.1.self_attn.q_proj": 4, "q_proj": 2, r"^model\.layers\.\d+\.mlp\.up": 6},
        alpha_pattern={"q_proj": 64, "layers.1.self_attn.q_proj": 1},
    )
    assert [config.rank(f"model.layers.1.{name}") for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up")] == [
        4,
        8,
        6,
    ]
    assert config.rank("model.layers.2.self_attn.q_proj") == 2
    assert config.rank("model.experts.1.layers.0.up") == 8
    assert config.alpha("model.layers.1.self_attn.q_proj") == 64
    assert config.alpha("model.layers.1.self_attn.v_proj") == 16


def test_all_bad_values_are_told_at_once():
    with pytest.raises(ConfigError) as error:
        LoraConfig(r=0, lora_alpha=-1, lora_dropout=1.0, init_lora_weights="pizza", rank_pattern={"(": 1.5})
    for word in ("r is 0", "lora_alpha is -1", "lora_dropout is 1.0", "'pizza'", "rank_pattern['('] is 1.5", "regular"):
        assert word in str(error.value)


@pytest.mark.parametrize("fields", [{"layers_to_transform": [0]}, {"target_modules": ["q"], "layers_pattern": ["h"]}])
def test_fields_that_need_each_other(fields):
    with pytest.raises(ConfigError, match="needs"):
        LoraConfig(**fields)
