"""One adapter out of several, on a model and on disk: what it does to every weight, and what it leaves alone."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import minilora as ml
from minilora import ConfigError, TargetError
from minilora.adapter import adapter_layers, own_parameters
from minilora.adapters.combine import CombineConfig, Factors, LowRank
from minilora.adapters.layout import base_model_of, base_quantization
from minilora.adapters.weighted import combine_adapters, combine_directories, config_of
from minilora.testing.compare import PARITY, assert_maths, relative
from tests.adapters import many_kinds
from tests.files import edit, save_file, write_adapter
from tests.models import four_bit, randn, seeds, tiny_model

weights = st.sampled_from([-1.0, 0.3, 0.7, 2.0])
starts = st.sampled_from([True, "gaussian", "orthogonal", "pissa"])


def add(model, name, seed=1, **config):
    """An adapter with random numbers; a start stays what it is."""
    ml.attach(model, ml.LoraConfig(**{"r": 2, "lora_alpha": 14, **config}), name, seed=seed, dtype=torch.float64)
    for i, layer in enumerate(layer for layer in adapter_layers(model).values() if name in layer.adapters):
        for j, parameter in enumerate(own_parameters(layer, name)):
            with torch.no_grad():
                parameter.copy_(randn(seed + 7 * i + j, *parameter.shape))


def weights_with(model, *names):
    """Path -> the weight that these adapters make of the base's."""
    found = {}
    for path, layer in adapter_layers(model).items():
        before, layer.active = layer.active, tuple(name for name in names if name in layer.adapters)
        found[path] = layer.weight.detach().double()
        layer.active = before
    return found


def assert_is_the_sum(model, name, weights):
    base, found = weights_with(model), weights_with(model, name)
    parts = {each: weights_with(model, each) for each in weights}
    for path in base:
        delta = sum(weight * (parts[each][path] - base[path]) for each, weight in weights.items())
        assert_maths(found[path], base[path] + delta)


@given(seeds, weights, weights, starts, st.booleans())
def test_the_new_adapter_makes_of_every_kind_of_weight_the_weighted_sum(seed, first, second, start, use_rslora):
    model = many_kinds()
    add(model, "first", seed, target_modules=["1", "3"], init_lora_weights=start, use_rslora=use_rslora)
    add(model, "second", seed + 50, target_modules=["0", "1", "2"], rank_pattern={"1": 3}, alpha_pattern={"0": 5})
    assert combine_adapters(model, {"first": first, "second": second}, "sum").keys() == set("0123")
    assert_is_the_sum(model, "sum", {"first": first, "second": second})


@pytest.mark.parametrize("base", [lambda model: model, four_bit])
def test_a_model_with_the_sum_computes_what_it_computes_with_adapters_of_those_scales(base):
    model = base(tiny_model())
    add(model, "first", r=3, lora_alpha=6)
    add(model, "second", 2, r=2, lora_alpha=7, target_modules=["q_proj", "down_proj"])
    add(model, "halved", 2, r=2, lora_alpha=3.5, target_modules=["q_proj", "down_proj"])
    combine_adapters(model, {"first": 1, "second": 0.5}, "sum")
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    found = model(ids)
    ml.set_adapter(model, ["first", "halved"])
    assert_maths(found, model(ids))


def test_the_sum_acts_frozen_and_the_others_are_as_they_were():
    model = many_kinds()
    for name in ("first", "second"):
        add(model, name, target_modules=["1", "3"])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    combine_adapters(model, {"first": 0.7, "second": 0.3}, "sum", CombineConfig("svd", svd_rank=1))
    assert all(layer.active == ("sum",) for layer in adapter_layers(model).values())
    assert {layer.adapters["sum"].scale for layer in adapter_layers(model).values()} == {1}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_a_path_that_is_the_end_of_another_keeps_its_own_rank():
    ranks = {"q": 2, "block.q": 5, "block.block.q": 3}
    cuts = {path: LowRank(Factors(randn(0, r, 3), randn(0, 3, r))) for path, r in ranks.items()}
    config = config_of(cuts, "CAUSAL_LM")
    assert {path: config.rank(path) for path in ranks} == {path: config.alpha(path) for path in ranks} == ranks
    assert config.task_type == "CAUSAL_LM"


@pytest.mark.parametrize(
    ("error", "said", "weights", "name"),
    [
        (TargetError, "the model has an adapter 'first' already", {"first": 2.0}, "first"),  # PEFT says nothing
        (
            TargetError,
            r"no adapter is called 'other'; the model has \['dora', 'first', 'more'\]",
            {"other": 0.3},
            "sum",
        ),
        (ConfigError, r"more: cannot be combined .* \['3'\]", {"first": 0.7, "more": 0.3}, "sum"),
        (ConfigError, r"dora: cannot be combined .* \['1'\]", {"dora": 1.0}, "sum"),
    ],
)
def test_what_cannot_be_combined_is_refused_and_changes_nothing(error, said, weights, name):
    model = many_kinds()
    add(model, "first", target_modules=["2"])
    add(model, "more", target_modules=["1"], modules_to_save=["3"])
    add(model, "dora", target_modules=["1"], use_dora=True)
    layers = {path: list(layer.adapters) for path, layer in adapter_layers(model).items()}
    with pytest.raises(error, match=said):
        combine_adapters(model, weights, name)
    assert {path: list(layer.adapters) for path, layer in adapter_layers(model).items()} == layers


# --- directories ---


def base_model():
    return many_kinds(dtype=torch.float32)


def write(path, model, seed=1, **config):
    return write_adapter(model, path, seed, **{"r": 2, "lora_alpha": 14, **config})


@pytest.fixture
def two(tmp_path):
    """Two adapters that share a module, with scales that differ, one of them rsLoRA's."""
    first = {"target_modules": ("0", "1", "2"), "use_rslora": True, "lora_dropout": 0.1, "task_type": "CAUSAL_LM"}
    second = {"r": 3, "target_modules": ("1", "3"), "rank_pattern": {"3": 1}, "alpha_pattern": {"3": 5}}
    return [write(tmp_path / "a", base_model(), **first), write(tmp_path / "b", base_model(), 2, **second)]


def merged(model):
    return {path: layer.weight for path, layer in adapter_layers(model).items()}


@pytest.mark.parametrize("config", [CombineConfig(), CombineConfig("svd", svd_rank=2)])
def test_what_is_written_is_what_a_model_makes_of_its_adapters(two, tmp_path, config):
    model = base_model()
    for name, path in zip("ab", two, strict=True):
        ml.load_adapter(model, path, name)
    expected = combine_adapters(model, {"a": 0.7, "b": -0.3}, "sum", config)
    cuts = combine_directories(two, [0.7, -0.3], tmp_path / "out", config)
    assert cuts.keys() == expected.keys()
    for path, cut in cuts.items():
        told = [torch.tensor([each.lost, each.total]) for each in (cut, expected[path])]
        assert relative(*told, PARITY) <= 1
    loaded = base_model()
    ml.load_adapter(loaded, tmp_path / "out")
    found, wanted = merged(loaded), merged(model)
    assert found.keys() == wanted.keys() == set("0123")
    assert all(relative(found[path], weight, PARITY) <= 1 for path, weight in wanted.items())


def test_the_config_says_scale_1_the_modules_and_the_base(two, tmp_path):
    combine_directories(two, [0.7, 0.3], tmp_path / "out", None, f"org/name@{'0' * 40}")
    values = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (values["r"], values["lora_alpha"], values["use_rslora"], values["lora_dropout"]) == (5, 5, False, 0)
    assert values["rank_pattern"] == values["alpha_pattern"] == {"^0": 2, "^2": 2, "^3": 1}
    assert values["target_modules"] == ["0", "1", "2", "3"]
    assert (values["base_model_name_or_path"], values["revision"]) == ("org/name", "0" * 40)
    assert values["task_type"] == "CAUSAL_LM"  # the first one's
    combine_directories(two[::-1], [0.7, 0.3], tmp_path / "other")
    assert json.loads((tmp_path / "other" / "adapter_config.json").read_text())["task_type"] is None
    assert base_model_of(tmp_path / "other") is None


def test_how_the_base_was_held_is_written_if_all_say_the_same(tmp_path):
    def model():
        return tiny_model(dtype=torch.float32, num_hidden_layers=1)

    dense = [write(tmp_path / name, model(), i) for i, name in enumerate("ab")]
    packed = [write(tmp_path / name, four_bit(model()), i) for i, name in enumerate("cd")]
    for paths in (dense, packed):
        combine_directories(paths, [1, 1], tmp_path / "out")
        assert base_quantization(tmp_path / "out") == base_quantization(paths[0]) is not None
    combine_directories([dense[0], packed[0]], [1, 1], tmp_path / "out")
    assert base_quantization(tmp_path / "out") is None
    ml.load_adapter(model(), tmp_path / "out")


@pytest.mark.parametrize(
    "config",
    [{"use_dora": True}, {"trainable_token_indices": {"0": (1, 2)}}, {"modules_to_save": ("3",)}, {"bias": "all"}],
)
def test_an_adapter_that_is_more_than_a_sum_of_updates_is_refused_by_its_path(two, tmp_path, config):
    model = base_model()
    ml.attach(model, ml.LoraConfig(target_modules=("1",), **config))
    ml.save_adapter(model, tmp_path / "third")
    with pytest.raises(ConfigError, match="third: cannot be combined with other adapters"):
        combine_directories([*two, tmp_path / "third"], [1, 1, 1], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tensors_that_the_config_does_not_speak_of_are_refused(two, tmp_path):
    path = two[0] / "adapter_model.safetensors"
    extra = {"base_model.model.1.lora_magnitude_vector": torch.ones(6)}
    save_file(load_file(path) | extra, path)
    with pytest.raises(ConfigError, match=r"more than updates s·B A.*1 \['magnitude'\]"):
        combine_directories(two, [1, 1], tmp_path / "out")


def test_an_adapter_that_began_as_a_part_of_the_weights_is_refused_and_what_helps_is_said(two, tmp_path):
    edit(two[1], init_lora_weights="pissa")
    with pytest.raises(ConfigError, match=r"b: init_lora_weights is 'pissa', .* loaded with its base and saved again"):
        combine_directories(two, [1, 1], tmp_path / "out")
    model = base_model()
    ml.load_adapter(model, two[1])
    ml.save_adapter(model, tmp_path / "plain")
    combine_directories([two[0], tmp_path / "plain"], [1, 1], tmp_path / "out")
