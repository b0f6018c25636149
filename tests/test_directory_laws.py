"""The laws of an adapter's directory: what `save_adapter` writes passes, and each planted mistake is found by name."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import minilora as ml
from minilora.testing import CheckFailure, NotApplicable, check_adapter_directory, laws
from minilora.testing.directory_laws import CONFIG, LAWS, PREFIX, WEIGHTS
from tests.adapters import many_kinds
from tests.files import edit
from tests.models import CONFIGS, WHOLE, perturb_, tiny_model

Q, EMBEDDING, HEAD = (
    f"{PREFIX}{name}" for name in ("model.layers.0.self_attn.q_proj", "model.embed_tokens", "lm_head")
)
PROJECTIONS = ("q_proj", "up_proj")


def saved(directory, model=None, **config):
    """Save an adapter that is as if it was trained; its directory."""
    model = tiny_model(WHOLE, dtype=torch.float32, num_hidden_layers=2) if model is None else model
    ml.attach(model, ml.LoraConfig(**{"r": 3, "lora_alpha": 21, **config}))
    perturb_(model)
    ml.save_adapter(model, directory)
    return directory


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("adapter"), target_modules=PROJECTIONS)


@pytest.fixture
def copy(adapter, tmp_path):
    return shutil.copytree(adapter, tmp_path / "adapter")


@pytest.mark.parametrize("case", CONFIGS)
def test_all_that_we_save_passes(case, tmp_path):
    assert len(check_adapter_directory(saved(tmp_path, **CONFIGS[case]))) == len(LAWS)


@pytest.mark.parametrize("config", [{}, {"use_dora": True}, {"bias": "all"}], ids=str)
def test_an_embedding_and_a_conv1d_pass(config, tmp_path):
    model = many_kinds(torch.float32)
    check_adapter_directory(saved(tmp_path, model, r=2, target_modules=("0", "1", "2"), **config))


def test_a_classifier_s_head_16_bit_numbers_and_a_path_as_text_pass(tmp_path):
    saved(tmp_path, modules_to_save=("lm_head",))
    edit(tmp_path, modules_to_save=["classifier", "score"])
    change(tmp_path, renamed("lm_head", "score"))
    change(tmp_path, lambda tensors: {name: tensor.bfloat16() for name, tensor in tensors.items()})
    check_adapter_directory(str(tmp_path))


def test_factors_of_stacked_experts_have_a_multiple_of_the_rank(tmp_path):
    edit(saved(tmp_path, r=6, target_modules=("q_proj",)), r=3, target_modules=[], target_parameters=["q_proj.weight"])
    check_adapter_directory(tmp_path)
    edit(tmp_path, r=4)
    assert_found(tmp_path, "shapes", ["found A (6, 24) and B (40, 6), accepted are A (4, in)"])
    edit(tmp_path, r=3)
    change(tmp_path, replaced(f"{Q}.lora_B.weight", lambda B: B[:, :5]))
    assert_found(tmp_path, "shapes", ["found A (6, 24) and B (40, 5), accepted are A (3, in)"])


# --- planted mistakes ---


def change(directory, change_tensors):
    tensors = change_tensors(load_file(directory / WEIGHTS))
    save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, directory / WEIGHTS)


def renamed(old, new):
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


def without(name):
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


def replaced(name, function):
    return lambda tensors: tensors | {name: function(tensors[name])}


def added(name, *shape):
    return lambda tensors: tensors | {name: torch.ones(shape)}


def exchanged(tensors):
    return {n.replace("lora_A", "?").replace("lora_B", "lora_A").replace("?", "lora_B"): t for n, t in tensors.items()}


def zero(tensors):
    return {name: tensor * ("lora_B" not in name) for name, tensor in tensors.items()}


DORA = {"use_dora": True}
NORM = f"{PREFIX}model.norm"
MAGNITUDE, ROWS = f"{Q}.lora_magnitude_vector", f"{EMBEDDING}.token_adapter.trainable_tokens_delta"
TENSORS = {  # config of the adapter, change of its tensors, the law that finds it, parts of the message
    "nan": ({}, replaced(f"{Q}.lora_A.weight", lambda A: A / 0 * 0), "values", ["q_proj.lora_A", "72 numbers", "none"]),
    "no prefix": ({}, renamed(PREFIX, ""), "names", ["model.layers.0", f"begin with {PREFIX}", "only warns"]),
    "adapter's name": ({}, renamed(".weight", ".default.weight"), "names", ["lora_A.default.weight: is nothing"]),
    "compiled": (
        {},
        renamed(f"{PREFIX}model.", f"{PREFIX}_orig_mod.model."),
        "names",
        ["in the plain model, without _orig_mod"],
    ),
    "sharded": ({}, renamed(".q_proj", "._fsdp_wrapped_module.q_proj"), "names", ["without _fsdp_wrapped_module"]),
    "adapted twice": (
        {},
        renamed("q_proj", "q_proj.base_layer"),
        "names",
        ["q_proj.base_layer: accepted is model.layers.0"],
    ),
    "a frozen weight": (
        {},
        added(f"{Q}.base_layer.weight", 40, 24),
        "names",
        ["is frozen; accepted is only an embedding"],
    ),
    "a frozen weight by itself": ({}, added(f"{NORM}.weight", 24), "names", ["norm.weight: is nothing that"]),
    "no B": ({}, without(f"{Q}.lora_B.weight"), "pairs", ["layers.0.self_attn.q_proj: found only lora_A.weight"]),
    "stray magnitude": (
        DORA,
        added(f"{NORM}.lora_magnitude_vector", 24),
        "pairs",
        ["model.norm: found only lora_magnitude_vector"],
    ),
    "no tensors": ({}, lambda tensors: {}, "pairs", ["found no tensor"]),
    "rank": ({}, replaced(f"{Q}.lora_B.weight", lambda B: B[:, :2]), "shapes", ["B (40, 2), accepted are A (3, in)"]),
    "exchanged": ({}, exchanged, "shapes", ["found A (40, 3)"]),
    "no magnitude": (DORA, without(MAGNITUDE), "dora", ["found none, accepted is (40,) since use_dora is true"]),
    "magnitude of inputs": (DORA, replaced(MAGNITUDE, lambda m: m[:24]), "dora", ["found (24,), accepted is (40,)"]),
    "bias in vain": (
        {},
        added(f"{Q}.base_layer.bias", 40),
        "biases",
        ["q_proj.base_layer.bias: found (40,), accepted"],
    ),
    "no bias of B": ({"lora_bias": True}, without(f"{Q}.lora_B.bias"), "biases", ["found none, accepted is (40,)"]),
    "no head": ({"modules_to_save": ("lm_head",)}, without(f"{HEAD}.weight"), "modules_to_save", ["found 'lm_head'"]),
    "rows": ({"trainable_token_indices": (7, 2)}, replaced(ROWS, lambda rows: rows[1:]), "rows", ["found [7, 2]"]),
    "other modules": (
        {},
        renamed("q_proj", "query"),
        "targets",
        ["layers.0.self_attn.query too", "layers.1"],
    ),
    "PEFT's own name": (
        {"modules_to_save": ("norm",)},
        renamed("model.norm.", "model.norm.modules_to_save.default."),
        "names",
        ["in the plain model, without modules_to_save"],
    ),
}


def assert_found(directory, law, parts):
    with pytest.raises(CheckFailure) as failure:
        check_adapter_directory(directory)
    assert failure.value.law == f"adapter_directory-{law}", failure.value
    for part in parts:
        assert part in str(failure.value)
    assert "case" not in str(failure.value)


@pytest.mark.parametrize("mistake", TENSORS)
def test_a_mistake_in_the_tensors_is_found(mistake, copy, tmp_path):
    config, change_tensors, law, parts = TENSORS[mistake]
    directory = saved(tmp_path / "own", **{"target_modules": PROJECTIONS, **config}) if config else copy
    change(directory, change_tensors)
    assert_found(directory, law, parts)


FIELDS = {
    "no peft_type": ("config", {"peft_type": None}, "peft_type: found None, accepted is 'LORA'"),
    "r of text": ("config", {"r": "3"}, "r: found '3', accepted is a whole number of at least 1"),
    "alpha": ("config", {"lora_alpha": -1}, "lora_alpha: found -1, accepted is a number above 0"),
    "flag": ("config", {"use_dora": "yes"}, "use_dora: found 'yes', accepted is true or false"),
    "expression": ("config", {"target_modules": "(q_proj"}, "target_modules: found '(q_proj'"),
    "rank of a pattern": (
        "shapes",
        {"rank_pattern": {"q_proj": 2, "self_attn.q_proj": 3}},
        "since rank_pattern['q_proj'], the first key that matches, is 2",
    ),
    "head of no classifier": ("modules_to_save", {"modules_to_save": ["classifier", "score"]}, "found 'classifier'"),
    "no target": ("targets", {"target_modules": ["q_proj"]}, "target_modules: found ['q_proj'], accepted is what"),
    "layer 0 alone": (
        "layers",
        {"layers_to_transform": [0]},
        "layers_to_transform: found [0], accepted is what keeps",
    ),
    "layer 1 alone": (
        "layers",
        {"layers_to_transform": 1},
        "found 1, accepted is what keeps model.layers.0.mlp.up",
    ),
    "layers of another name": (
        "layers",
        {"layers_to_transform": [0, 1], "layers_pattern": "h"},
        "layers_to_transform: found [0, 1] with layers_pattern 'h', accepted is what keeps model.layers.0.",
    ),
    "layers of other names": (
        "layers",
        {"layers_to_transform": [0, 1], "layers_pattern": ["h", "mlp"]},
        "['h', 'mlp']",
    ),
    "an excluded name": ("layers", {"exclude_modules": ["up_proj"]}, "exclude_modules: found ['up_proj'], accepted is"),
    "an excluded expression": ("layers", {"exclude_modules": r".*\.1\..*q_proj"}, "keeps model.layers.1.self_attn.q"),
    "a layer of text": ("config", {"layers_to_transform": ["0"]}, "layers_to_transform: found ['0'], accepted is a"),
    "a pattern of layers": ("config", {"layers_pattern": "("}, "layers_pattern: found '(', accepted is a list of"),
    "a pattern as a number": (
        "config",
        {"exclude_modules": 3},
        "exclude_modules: found 3, accepted is a list",
    ),
    "an expression's end": ("targets", {"target_modules": "q_proj|up_proj"}, "found 'q_proj|up_proj', accepted is"),
}


@pytest.mark.parametrize("mistake", FIELDS)
def test_a_mistake_in_the_config_is_found(mistake, copy):
    law, fields, said = FIELDS[mistake]
    edit(copy, **fields)
    assert_found(copy, law, [said, CONFIG] if law not in ("shapes", "dora", "biases") else [said, WEIGHTS])


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj", "up_proj", "query"]},
        {"alpha_pattern": {"k_proj": 2}, "rank_pattern": {"k_proj": 2}},
        {"layers_to_transform": [0, 1, 7]},
        {"layers_to_transform": [0, 1], "layers_pattern": ["h", "layers"]},
        {"layers_to_transform": []},
        {"layers_to_transform": [7], "target_modules": r".*\.(q|up)_proj"},
        {"exclude_modules": ["0.mlp.down_proj", "proj"]},
        {"exclude_modules": "q_proj"},
    ],
    ids=str,
)
def test_settings_that_match_nothing_pass(fields, copy):
    edit(copy, **fields)
    check_adapter_directory(copy)


def test_an_adapter_that_is_not_trained_passes(copy):
    change(copy, zero)
    check_adapter_directory(copy)


BROKEN = {
    "no config": lambda path: (path / CONFIG).unlink(),
    "no tensors": lambda path: (path / WEIGHTS).unlink(),
    "no JSON": lambda path: (path / CONFIG).write_text("{"),
    "no safetensors": lambda path: (path / WEIGHTS).write_bytes(b"PK" * 50),
    "cut off": lambda path: (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes()[:-1]),
    "a pickle beside": lambda path: (path / "adapter_model.bin").write_bytes(b""),
}


@pytest.mark.parametrize("mistake", BROKEN)
def test_files_that_cannot_be_read_are_found_by_one_law(mistake, copy):
    BROKEN[mistake](copy)
    assert_found(copy, "files", ["found", "accepted"])
    if mistake != "a pickle beside":
        with pytest.raises(NotApplicable, match="cannot be read"):
            laws("adapter_directory")["shapes"].check(copy)
