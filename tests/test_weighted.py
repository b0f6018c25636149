"""One adapter out of several, on a model: what it does to every weight, and what it leaves alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import minilora as ml
from minilora import ConfigError, ShapeError, TargetError
from minilora.adapter import adapter_layers, layers_of
from minilora.adapters.combine import CombineConfig
from minilora.adapters.weighted import combine_adapters, config_of
from minilora.lora import lora_delta
from minilora.testing.compare import assert_maths
from tests.adapters import many_kinds
from tests.models import four_bit, randn, seeds, tiny_model

weights = st.sampled_from([-1.0, 0.3, 0.7, 2.0])
starts = st.sampled_from([True, "gaussian", "orthogonal", "pissa", "olora"])


def add(model, name, seed=1, **config):
    """An adapter with random numbers; a start stays what it is."""
    ml.attach(model, ml.LoraConfig(**{"r": 2, "lora_alpha": 14, **config}), name, seed=seed, dtype=torch.float64)
    for i, layer in enumerate(layer for layer in adapter_layers(model).values() if name in layer.configs):
        for j, parameter in enumerate(layer.own_parameters(name)):
            with torch.no_grad():
                parameter.copy_(randn(seed + 7 * i + j, *parameter.shape))


def weights_with(model, *names):
    """Path -> the weight that these adapters make of the base's."""
    found = {}
    for path, layer in adapter_layers(model).items():
        before, layer.active = layer.active, tuple(name for name in names if name in layer.configs)
        found[path] = layer.merged_weight().detach().double()
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
    config = config_of({path: ml.adapters.combine.Factors(randn(0, r, 3), randn(0, 3, r)) for path, r in ranks.items()})
    assert {path: config.rank(path) for path in ranks} == {path: config.alpha(path) for path in ranks} == ranks
    assert config.task_type == "CAUSAL_LM"


@pytest.mark.parametrize(
    ("error", "said", "groups", "weights", "name"),
    [
        (TargetError, "the model has an adapter 'first' already", 1, {"first": 2.0}, "first"),  # PEFT says nothing
        (TargetError, r"no adapter is called 'other'; the model has \['first', 'more'\]", 1, {"other": 0.3}, "sum"),
        (ConfigError, r"more: .*\n.*modules_to_save: ", 1, {"first": 0.7, "more": 0.3}, "sum"),
        (ShapeError, r"^2: the adapters do not fit together", 2, {"first": 0.7}, "sum"),
    ],
)
def test_what_cannot_be_combined_is_refused_and_changes_nothing(error, said, groups, weights, name):
    model = many_kinds(groups=groups)
    add(model, "first", target_modules=["2"])
    add(model, "more", target_modules=["1"], modules_to_save=["3"])
    layers = {path: list(layer.configs) for path, layer in adapter_layers(model).items()}
    with pytest.raises(error, match=said):
        combine_adapters(model, weights, name)
    assert {path: list(layer.configs) for path, layer in adapter_layers(model).items()} == layers


def test_an_adapter_below_a_module_that_another_trains_in_full_is_found_by_its_path():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5)).double()
    add(model, "whole", target_modules=("1",), modules_to_save=("0",))
    add(model, "first", target_modules=("0",))
    combine_adapters(model, {"first": 2.0}, "second")
    adapters = layers_of(model, "second")["0"].adapters
    first, second = (lora_delta(*adapters[name].factors(), adapters[name].scale) for name in ("first", "second"))
    assert_maths(second, 2 * first)
