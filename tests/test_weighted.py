"""One adapter out of several: what it does to every weight, and what it leaves alone."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import minilora as ml
from minilora import ConfigError, TargetError
from minilora.adapter import adapter_layers, layers_of, own_parameters
from minilora.adapters.files import config_of_adapter
from minilora.adapters.weighted import Factors, combine_adapters, concatenate
from minilora.testing import reference
from minilora.testing.compare import assert_maths
from tests.adapters import many_kinds
from tests.files import edit, write_adapter
from tests.models import randn, scales, seeds, sizes

weights = st.sampled_from([-1.0, 0.3, 0.7, 2.0])
starts = st.sampled_from([True, "gaussian", "pissa"])


several = st.lists(st.tuples(sizes, scales, weights), min_size=1, max_size=4)


def delta(factors):
    """s·B A by the loops of the oracle."""
    A, B = factors.lora_A.numpy(), factors.lora_B.numpy()
    return torch.from_numpy(reference.lora_merged_weight(np.zeros((len(B), A.shape[1])), A, B, factors.scale))


@given(seeds, sizes, sizes, several)
def test_adapters_add_by_concatenating_ranks(seed, outer, inner, drawn):
    ranks, factors, w = zip(*drawn, strict=True)
    pairs = enumerate(zip(ranks, factors, w, strict=True))
    parts = [Factors(randn(seed + 2 * i, r, inner), randn(seed + 2 * i + 1, outer, r), s * w) for i, (r, s, w) in pairs]
    found = concatenate(parts)
    assert found.lora_A.shape == (sum(ranks), inner)
    assert found.lora_B.shape == (outer, sum(ranks))
    assert found.scale == 1
    assert_maths(delta(found), sum(map(delta, parts)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_s_b_is_rounded_and_once_to_float32(dtype):
    part = Factors(randn(0, 2, 7, dtype=dtype), randn(1, 60, 2, dtype=dtype), 0.7)
    lora_A, lora_B, _ = concatenate([part, part])
    assert torch.equal(lora_A[2:], part.lora_A.float())
    assert torch.equal(lora_B[:, 2:], (0.7 * part.lora_B.double()).float())


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
    combine_adapters(model, {"first": first, "second": second}, "sum")
    assert_is_the_sum(model, "sum", {"first": first, "second": second})
    config = config_of_adapter(layers_of(model, "sum"), "sum")
    assert (config.use_rslora, config.rank_pattern, config.alpha_pattern) == (False, {}, {})
    ranks = {len(layer.adapters["sum"].lora_A) for layer in layers_of(model, "sum").values()}
    assert ranks == {config.r} == {config.lora_alpha} == {7 if start == "pissa" else 5}


def test_the_sum_acts_frozen_and_the_others_are_as_they_were():
    model = many_kinds()
    for name in ("first", "second"):
        add(model, name, target_modules=["1", "3"])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    combine_adapters(model, {"first": 0.7, "second": 0.3}, "sum")
    assert all(layer.active == ("sum",) for layer in adapter_layers(model).values())
    assert {layer.adapters["sum"].scale for layer in adapter_layers(model).values()} == {1}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize(
    ("error", "said", "weights", "name"),
    [
        (TargetError, "'first': the model has it already", {"first": 2.0}, "first"),  # PEFT says nothing
        (
            TargetError,
            r"no adapter is called 'other'; the model has .*'dora', 'first', 'more'",
            {"other": 0.3},
            "sum",
        ),
        (ConfigError, "need adapters with updates and a finite weight for each", {}, "sum"),
        *((ConfigError, "a finite weight for each", {"first": bad}, "sum") for bad in (math.nan, math.inf)),
        *(
            (ConfigError, f"{name}: cannot be combined .* in {path} it has more than an update", {name: 1.0}, "sum")
            for name, path in (("dora", 1), ("biased", 1), ("with bias", 1), ("more", 3), ("rows", 0))
        ),
    ],
)
def test_what_cannot_be_combined_is_refused_and_changes_nothing(error, said, weights, name):
    model = many_kinds()
    add(model, "first", target_modules=["2"])
    add(model, "more", target_modules=["1"], modules_to_save=["3"])
    add(model, "dora", target_modules=["1"], use_dora=True)
    add(model, "biased", target_modules=["1"], lora_bias=True)
    add(model, "with bias", target_modules=["1"], bias="lora_only")
    add(model, "rows", target_modules=["1"], trainable_token_indices={"0": (1, 2)})
    layers = {path: list(layer.adapters) for path, layer in adapter_layers(model).items()}
    with pytest.raises(error, match=said):
        combine_adapters(model, weights, name)
    assert {path: list(layer.adapters) for path, layer in adapter_layers(model).items()} == layers


def test_an_adapter_that_began_as_a_part_of_weights_that_are_not_loaded_is_refused(tmp_path):
    adapter = write_adapter(many_kinds(dtype=torch.float32), tmp_path, r=2, target_modules=("1", "2"))
    edit(adapter, init_lora_weights="pissa")
    model = many_kinds(dtype=torch.float32)
    ml.load_adapter(model, adapter, "loaded")
    combine_adapters(model, {"loaded": 0.5}, "sum")
    model = many_kinds(dtype=torch.float32).to("meta")
    ml.load_adapter(model, adapter, "bare")
    with pytest.raises(ConfigError, match="a part of weights that are not loaded"):
        combine_adapters(model, {"bare": 0.5}, "sum")
