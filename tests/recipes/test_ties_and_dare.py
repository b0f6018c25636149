"""TIES and DARE: number by number, as their papers tell it, and as PEFT's types on updates compute it."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import minilora as ml
from minilora.adapter import adapter_layers
from minilora.lora import lora_delta
from minilora.testing.compare import assert_parity, relative
from recipes.ties_and_dare import combine, drop
from tests.models import fill_, generator, randn, seeds

densities = st.sampled_from([0.2, 0.5, 0.9])
weights = st.sampled_from([-2.0, -0.3, 0.7, 3.0])
TARGETS = {"a": ("0", "1"), "b": ("1",), "c": ("1",)}  # of a model of two linears


def adapted(seed=0, names="abc"):
    """A model with adapters of different ranks, scales and modules, and their updates in float64."""
    model = nn.Sequential(nn.Linear(7, 6), nn.Linear(6, 9))
    fill_(model, seed)
    for i, name in enumerate(names):
        ml.attach(model, ml.LoraConfig(r=2 + i, lora_alpha=3 + 4 * i, target_modules=TARGETS[name]), name)
        for path in TARGETS[name]:
            adapter = model[int(path)].adapters[name]
            adapter.lora_B.data.copy_(randn(seed + i, *adapter.lora_B.shape))
    return model


def delta(model, path, name):
    adapter = model[int(path)].adapters[name]
    return lora_delta(*(factor.detach().double() for factor in (adapter.lora_A, adapter.lora_B)), adapter.scale)


def brute_force(updates, given, density, elect):
    """Number by number, as the papers tell it."""
    updates = [update.numpy().copy() for update in updates]
    for update in updates:
        order = sorted(range(update.size), key=lambda i: -abs(update.flat[i]))
        for i in order[int(density * update.size) :]:
            update.flat[i] = 0
    mixed = np.zeros_like(updates[0])
    for i in range(mixed.size):
        numbers = [update.flat[i] for update in updates]
        vote = math.fsum(numbers)
        chosen = [j for j, n in enumerate(numbers) if (n > 0 and vote >= 0) or (n < 0 and vote < 0)]
        if elect:
            mixed.flat[i] = sum(given[j] * numbers[j] for j in chosen) / max(1, len(chosen))
        else:
            mixed.flat[i] = sum(weight * number for weight, number in zip(given, numbers, strict=True))
    return mixed


@given(seeds, densities, st.tuples(weights, weights, weights), st.booleans())
def test_what_is_combined_is_what_brute_force_combines(seed, density, given, elect):
    model = adapted(seed)
    combine(model, dict(zip("abc", given, strict=True)), "all", r=6, density=density, elect=elect)
    for path, names in (("0", "a"), ("1", "abc")):
        expected = brute_force([delta(model, path, name) for name in names], given[: len(names)], density, elect)
        assert relative(delta(model, path, "all"), expected, 1e-5) < 1


def test_the_result_is_the_best_of_its_rank_and_leaves_the_others():
    model, names = adapted(), {"a": 0.7, "b": 0.3}
    before = {name: delta(model, "1", name) for name in "abc"}
    combine(model, names, "whole", r=6, density=0.5)
    combine(model, names, "cut", r=2, density=0.5)
    U, S, Vh = torch.linalg.svd(delta(model, "1", "whole"), full_matrices=False)
    assert relative(delta(model, "1", "cut"), (U[:, :2] * S[:2]) @ Vh[:2], 1e-5) < 1
    assert all(torch.equal(delta(model, "1", name), update) for name, update in before.items())
    assert {layer.active for layer in adapter_layers(model).values()} == {("cut",)}


@given(seeds, densities)
def test_dare_drops_a_share_and_makes_up_for_it(seed, density):
    n = 20_000
    dropped = drop(torch.full((4, n // 4), 4.0), density, generator(seed)).double()
    assert relative(dropped.unique(), [0.0, 4 / density], 1e-6) < 1
    sigma = (density * (1 - density) / n) ** 0.5
    assert abs((dropped != 0).double().mean().item() - density) < 6 * sigma


def test_what_dare_drops_is_said_by_the_seed_alone_and_nothing_at_density_1():
    model, state = adapted(), torch.random.get_rng_state()
    for name, seed in (("first", 1), ("again", 1), ("other", 2)):
        combine(model, {"b": 1, "c": 2}, name, r=6, density=0.5, dare=True, seed=seed)
    first, again, other = (delta(model, "1", name) for name in ("first", "again", "other"))
    assert torch.equal(first, again)
    assert relative(first, other, 1e-5) > 1
    assert torch.equal(state, torch.random.get_rng_state())
    combine(model, {"b": 1, "c": 2}, "sum", r=6, density=1.0, elect=False, dare=True)
    assert relative(delta(model, "1", "sum"), delta(model, "1", "b") + 2 * delta(model, "1", "c"), 1e-5) < 1


@pytest.mark.parametrize("more", [{"use_dora": True}, {"modules_to_save": ("1",)}])
def test_an_adapter_that_is_no_sum_of_updates_is_refused(more):
    model = nn.Sequential(nn.Linear(7, 6), nn.Linear(6, 9))
    ml.attach(model, ml.LoraConfig(r=2, target_modules=("0",), **more))
    with pytest.raises(ml.ConfigError, match="default: is more than the updates"):
        combine(model, {"default": 1}, "new", r=2, density=0.5)


def test_a_rank_above_that_of_a_weight_is_refused_and_nothing_is_attached():
    model = adapted()
    with pytest.raises(ml.ConfigError, match="0: rank 7 is more than 6"):
        combine(model, {"a": 1, "b": 1}, "new", r=7, density=0.5)
    assert {name for layer in adapter_layers(model).values() for name in layer.adapters} == set("abc")
    assert model[1].active == ("c",)


THEIR_TYPES = {
    "ties_svd": {},
    "svd": {"density": 1.0, "elect": False},
    "magnitude_prune_svd": {"elect": False},
    "dare_ties_svd": {"dare": True},
    "dare_linear_svd": {"dare": True, "elect": False},
}


@pytest.mark.parity
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("kind", THEIR_TYPES)
def test_peft_s_types_on_updates_combine_the_same(monkeypatch, kind):
    peft = pytest.importorskip("peft")
    # the same mask for ours and theirs, which draw in another order
    mask = lambda p, generator=None: (torch.arange(p.numel()) % 5 < 3).to(p.dtype).view_as(p)  # noqa: E731
    monkeypatch.setattr(torch, "bernoulli", mask)
    ours, fields = adapted(names="ab"), {"a": (2, 3), "b": (3, 7)}
    configs = {
        n: peft.LoraConfig(r=r, lora_alpha=alpha, target_modules=list(TARGETS[n])) for n, (r, alpha) in fields.items()
    }
    theirs = peft.get_peft_model(nn.Sequential(nn.Linear(7, 6), nn.Linear(6, 9)), configs["a"], adapter_name="a")
    theirs.add_adapter("b", copy.deepcopy(configs["b"]))
    for name in "ab":
        for path in TARGETS[name]:
            for letter in ("A", "B"):
                factor = getattr(theirs.base_model.model.get_submodule(path), f"lora_{letter}")[name].weight
                factor.data.copy_(getattr(ours[int(path)].adapters[name], f"lora_{letter}"))
    theirs.add_weighted_adapter(["a", "b"], [0.7, -0.3], "sum", kind, density=0.6, svd_rank=6)
    combine(ours, {"a": 0.7, "b": -0.3}, "sum", r=6, **{"density": 0.6, **THEIR_TYPES[kind]})
    for path in ("0", "1"):
        assert_parity(delta(ours, path, "sum"), theirs.base_model.model.get_submodule(path).get_delta_weight("sum"))
