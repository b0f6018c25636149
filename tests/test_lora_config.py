import pytest

from minilora import ConfigError, LoraConfig, TargetError
from minilora.adapters.config import is_target, select_saved, select_targets

LINEARS = [f"model.layers.{i}.{name}" for i in range(12) for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up")]
LINEARS += ["model.experts.1.layers.0.up", "lm_head"]
Q_PROJS = [path for path in LINEARS if path.endswith("q_proj")]
EMBEDDINGS = ["model.embed_tokens", "model.stem.0"]
MODULES = ["", "model", "model.layers", "model.layers.0", "head", "head_norm", "lm_head"]
MODULES += ["classifier", "classifier.out_proj"]

# What PEFT's own tests hold for these: path, target_modules, layers_to_transform, layers_pattern.
Q_PROJ = "transformer.h.1.attn.attention.q_proj"
MEANT = [
    ("foo", ["foo"], None, None),
    ("foo", "foo", None, None),
    ("foo", "fo.*", None, None),
    *(("foo.bar.1.baz", ["baz"], numbers, ["bar"]) for numbers in ([1], [0, 1, 2])),
    *(("foo.whatever.1.baz", ["baz"], [1], nothing) for nothing in ([], "", None)),
    *((Q_PROJ, ["q_proj", "v_proj"], *layers) for layers in ((None, None), ([0, 1, 2], None), ([0, 1], "h"))),
    *((f"{root}bar.001.baz", ["baz"], [1], ["bar"]) for root in ("", "foo.")),
    *((f"{root}bar.1.spam.2.baz", ["baz"], [1], ["other", "bar"]) for root in ("", "foo.")),
    ("model.layers.1.experts.0.up", ["up"], [1], None),
    *((f"{root}layers.1.layers.0.up", ["up"], [0], [r"\d+\.layers"]) for root in ("", "model.")),
    ("h.1.up", ["up"], [1], ["(h|layers)"]),
]
NOT_MEANT = [
    ("", [], None, None),
    ("foo", ["bar"], None, None),
    ("foo", ".*bar.*", None, None),
    *(("foo.bar.1.baz", ["baz"], [number], ["bar"]) for number in (0, 2)),
    *(("foo.bar.10.baz", ["baz"], [number], None) for number in (0, 1)),
    *(("foo.whatever.1.baz", ["baz"], [0], nothing) for nothing in ([], "", None)),
    (f"{Q_PROJ}.foo", ["q_proj"], None, None),
    ("transformer.h.1.attn.attention.resid_dropout", ["q_proj", "v_proj"], None, None),
    *(("foo.bar.1.baz", ["baz"], [1], [other]) for other in ("foo", "baz", "ar")),
    *((f"{root}bar.2.spam.1.baz", ["baz"], [1], ["bar"]) for root in ("", "foo.")),
    ("model.layers.1.experts.0.up", ["up"], [0], None),
    ("model.layers.1.layers.0.up", ["up"], [0], ["layers"]),
]


def named(targets, layers, pattern):
    return {"target_modules": targets, "layers_to_transform": layers, "layers_pattern": pattern}


def chosen(linears=LINEARS, **fields):
    return select_targets(linears, LoraConfig(**fields), head="lm_head", embeddings=EMBEDDINGS)


@pytest.mark.parametrize("case", [*((*case, True) for case in MEANT), *((*case, False) for case in NOT_MEANT)], ids=str)
def test_names_mean_what_they_mean_to_peft_and_nothing_else(case):
    path, *names, is_meant = case
    assert is_target(path, LoraConfig(**named(*names))) == is_meant


# what is meant -> the fields of the config (and the model's linears), which of the linears
RULES = {
    "all linears but the head": ({}, LINEARS[:-1]),
    "whatever its case": ({"target_modules": "All-Linear"}, LINEARS[:-1]),
    "never a part of a name": ({"target_modules": ["up"]}, [p for p in LINEARS if p.endswith(".up")]),
    "several components": ({"target_modules": ["1.mlp.up"]}, ["model.layers.1.mlp.up"]),  # and not layer 11
    "excluded by name": ({"target_modules": ["q_proj", "up"], "exclude_modules": ["up"]}, Q_PROJS),
    "a plain name that is not in a list": ({"target_modules": "q_proj"}, Q_PROJS),
    "one with dots": ({"target_modules": "1.mlp.up"}, ["model.layers.1.mlp.up"]),
    "one that is excluded": ({"target_modules": ["q_proj", "up"], "exclude_modules": "up"}, Q_PROJS),
    "one of some layers": ({"target_modules": "up", "layers_to_transform": 0}, ["model.layers.0.mlp.up"]),
    "excluded by regex": ({"exclude_modules": r".*layers.*|.*exp.*", "target_modules": ["lm_head", "up"]}, ["lm_head"]),
    "one layer": ({"target_modules": ["up"], "layers_to_transform": 0}, ["model.layers.0.mlp.up"]),
    "one layer of all lists of these names": (
        {"target_modules": ["up"], "layers_to_transform": 0, "layers_pattern": "h|layers"},
        ["model.layers.0.mlp.up", "model.experts.1.layers.0.up"],
    ),
    "no layers, all layers": ({"target_modules": ["q_proj"], "layers_to_transform": []}, Q_PROJS),
    "layers hold for full paths too": (
        {"target_modules": ["model.layers.1.mlp.up", "model.layers.2.mlp.up"], "layers_to_transform": [2]},
        ["model.layers.2.mlp.up"],
    ),
    "what all-linear leaves alone, by name": ({"target_modules": ["embed_tokens", "stem.0"]}, EMBEDDINGS),
    "the same by regex": ({"target_modules": r".*embed.*|.*\.1\.mlp\..*"}, ["model.layers.1.mlp.up", EMBEDDINGS[0]]),
    "nothing that is trained in full, nor below it": (
        {"modules_to_save": ["model.layers", "lm_head"]},
        ["model.experts.1.layers.0.up"],
    ),
    "but not what only ends or starts like it": ({"modules_to_save": ["head", "model.layers.1.mlp.u"]}, LINEARS[:-1]),
    "no classifier of a classifier": (
        {"linears": ["up", "score", "classifier.dense", "pre_score"], "task_type": "SEQ_CLS"},
        ["up", "pre_score"],
    ),
    "any classifier of another model": ({"linears": ["up", "score"]}, ["up", "score"]),
    "nothing, if that is asked for": ({"target_modules": [], "modules_to_save": ["head"]}, []),
    "nothing, if there are tokens to train": ({"target_modules": (), "trainable_token_indices": [1]}, []),
}


@pytest.mark.parametrize("rule", RULES)
def test_target_modules_means(rule):
    fields, expected = RULES[rule]
    assert sorted(chosen(**fields)) == sorted(expected)


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj", "qq_proj"]},  # also where another entry matches
        {"target_modules": "(q_proj)"},  # a regex must match the whole path
        {"target_modules": ["q_proj"], "exclude_modules": ["k_proj"]},
        {"target_modules": ["q_proj"], "rank_pattern": {"v_proj": 2}},
        {"target_modules": ["q_proj"], "alpha_pattern": {"layers.99.self_attn.q_proj": 2}},
        {"target_modules": ["q_proj"], "layers_to_transform": [99]},
        {"target_modules": []},
        {"target_modules": ["lm_head"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "exclude_modules": ["model"]},  # which is no module that can be adapted
    ],
)
def test_what_matches_nothing_is_an_error_that_lists_what_there_is(fields):
    with pytest.raises(TargetError, match=r"\['0', 'embed_tokens', 'lm_head', 'q_proj', 'up', 'v_proj'\]"):
        chosen(**fields)


def test_the_first_key_of_a_pattern_that_matches_counts():
    config = LoraConfig(
        r=8,
        lora_alpha=16,
        rank_pattern={"layers.1.self_attn.q_proj": 4, "q_proj": 2, r"^model\.layers\.\d+\.mlp\.up": 6},
        alpha_pattern={"q_proj": 64, "layers.1.self_attn.q_proj": 1},
    )
    paths = [f"model.layers.1.{name}" for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up")]
    paths += ["model.layers.2.self_attn.q_proj", "model.experts.1.layers.0.up"]
    assert [config.rank(path) for path in paths] == [4, 8, 6, 2, 8]
    assert [config.alpha(path) for path in paths[:2]] == [64, 16]


def test_all_bad_values_are_told_at_once():
    bad = {"r": 0, "lora_alpha": -1, "lora_dropout": 1.0, "init_lora_weights": "pizza", "rank_pattern": {"(": 0}}
    with pytest.raises(ConfigError) as error:
        LoraConfig(**bad, trainable_token_indices=(-1,), alpha_pattern={"up": 10**400})
    named = ("r is 0", "lora_alpha is -1", "lora_dropout is 1.0", "'pizza'", "rank_pattern['('] is 0", "regular")
    for words in (*named, "trainable_token_indices is (-1,)", "alpha_pattern['up'] is 1000"):
        assert words in str(error.value)


RECIPES = {"eva": "from_inputs", "corda": "from_inputs", "lora_ga": "from_gradients", "olora": "from_weights"}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        *(({"init_lora_weights": init}, f"accepted are .*recipes/starts_{RECIPES[init]}.py") for init in RECIPES),
        ({"layers_to_transform": [0]}, "layers_to_transform needs"),
        ({"target_modules": ["q"], "layers_pattern": "h"}, "layers_pattern needs"),
        ({"lora_bias": True, "use_dora": True}, "lora_bias goes neither"),
        ({"lora_bias": True, "init_lora_weights": "gaussian"}, "lora_bias goes neither"),
    ],
)
def test_fields_that_cannot_work_together_or_are_recipes_are_refused(fields, said):
    with pytest.raises(ConfigError, match=said):
        LoraConfig(**fields)


@pytest.mark.parametrize(
    ("entries", "found"),
    [
        (["head"], ["head"]),  # and not lm_head
        (["layers", "model"], ["model"]),  # once, not also what it holds
        (["classifier", "out_proj"], ["classifier"]),
        (["head_norm", "head"], ["head", "head_norm"]),
    ],
)
def test_modules_to_save_are_names_or_the_ends_of_paths(entries, found):
    assert select_saved(MODULES, LoraConfig(modules_to_save=entries)) == found


def test_the_head_of_a_classifier_is_trained_in_full():
    config = LoraConfig(task_type="TOKEN_CLS", modules_to_save=["lm_head"])
    assert select_saved(MODULES, config) == ["lm_head", "classifier"]
    assert select_saved(["model"], LoraConfig(task_type="TOKEN_CLS")) == []
    named = LoraConfig(task_type="TOKEN_CLS", modules_to_save=["classifier", "score"])  # as PEFT's files do
    assert select_saved(MODULES, named) == ["classifier"]


def test_an_entry_that_is_nowhere_is_an_error_that_lists_what_there_is():
    with pytest.raises(TargetError, match=r"\['heads'\].*'classifier', 'head', 'head_norm'"):
        select_saved(MODULES, LoraConfig(modules_to_save=["head", "heads"]))
