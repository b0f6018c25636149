"""EVA and CorDA as their papers and PEFT define them; what all starts that look at data have in common."""

import dataclasses
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from torch import nn

import minilora as ml
from minilora.adapter import adapter_layers
from minilora.data import collate
from minilora.testing.compare import assert_parity, relative
from minilora.training import token_loss
from recipes.starts_from_gradients import lora_ga
from recipes.starts_from_inputs import corda, eva
from tests.models import (
    WHOLE,
    best_of_rank,
    examples,
    fill_,
    four_bit,
    randn,
    randomize_adapters_,
    scales,
    seeds,
    tiny_model,
    token_ids,
)
from tests.training import random_rows

LINEARS = ("wide", "narrow", "other")
R, ALPHA = 4, 12
NEAR = 1e-5  # of what float32 decompositions amplify
IDS = token_ids(0, 2, 7)


class Parallel(nn.Module):
    """Layers that see the same input, or what a fixed matrix makes of it: of mean zero, if the input's is."""

    def __init__(self, seed=0):
        super().__init__()
        self.wide, self.narrow, self.other = nn.Linear(12, 20), nn.Linear(12, 8), nn.Linear(12, 15, bias=False)
        fill_(self, seed)
        self.turn = 0.6 ** torch.arange(12) * randn(5, 12, 12, dtype=torch.float32)

    def forward(self, x):
        return torch.cat((self.wide(x), self.narrow(x), self.other(x @ self.turn)), dim=-1).tanh()

    def loss(self, x):
        return self(x).square().mean()

    def losses(self, data):
        return (self.loss(x) for x in data)

    def inputs(self, data):
        x = torch.cat(data)
        return {"wide": x, "narrow": x, "other": x @ self.turn}


def data(seed=0):
    """Four batches, each of mean zero, along some directions more than along others."""
    spread = 0.8 ** torch.arange(12, dtype=torch.float32)
    halves = [spread * randn(seed + i, 40, 12, dtype=torch.float32) for i in range(4)]
    return [torch.cat((half, -half)) for half in halves]


def config_of(r=R, alpha=ALPHA, **fields):
    return ml.LoraConfig(r=r, lora_alpha=alpha, target_modules=LINEARS, **fields)


def best(matrix, r):
    return best_of_rank(matrix, r)[0]


@examples(0.3)
@given(seeds)
def test_eva_s_a_are_the_right_singular_vectors_of_all_inputs_and_b_is_zero(seed):
    model = Parallel(seed)
    _, start = eva(model, config_of(r=3), model.losses(data(seed)))
    for path, X in model.inputs(data(seed)).items():
        lora_A, lora_B = start[path]
        V = np.linalg.svd(X.double().numpy())[2][: len(lora_A)]
        signs = np.sign((lora_A.numpy() * V).sum(1, keepdims=True))
        assert relative(lora_A, signs * V, NEAR) < 1
        assert lora_B.shape == (model.get_submodule(path).out_features, len(lora_A))
        assert not lora_B.any()


def test_a_layer_that_gets_no_rank_is_left_out_and_another_gets_what_it_had():
    model = nn.ModuleDict({"up": nn.Linear(7, 9), "down": nn.Linear(9, 8)})
    inputs = torch.eye(7), torch.eye(9)[[0, 4]]  # shares of 1/7 and of 1/2
    losses = (model["up"](x).sum() + model["down"](z).sum() for x, z in [inputs])
    config, start = eva(model, ml.LoraConfig(r=1, target_modules=("up", "down")), losses)
    assert config.target_modules == ("down",)
    assert config.rank("down") == len(start["down"][0]) == 2


@examples(0.3)
@given(seeds, scales)
def test_corda_s_b_a_is_the_first_part_of_the_weight_as_inputs_weigh_it(seed, scale):
    model = Parallel(seed)
    start = corda(model, config_of(alpha=R * scale), model.losses(data(seed)))
    for path, X in model.inputs(data(seed)).items():
        C = (X.T.double() @ X.double()).numpy()
        C += 0.01 * np.trace(C) / len(C) * np.eye(len(C))
        lora_A, lora_B = start[path]
        W = model.get_submodule(path).weight.detach().double().numpy()
        assert relative(scale * lora_B @ lora_A, best(W @ C, R) @ np.linalg.inv(C), NEAR) < 1


KINDS = {  # (model, config, losses) -> config, start
    "eva": eva,
    "corda": lambda *arguments: (arguments[1], corda(*arguments)),
}
ALL = {**KINDS, "lora_ga": lambda *arguments: (arguments[1], lora_ga(*arguments))}


@pytest.mark.parametrize("kind", ALL)
def test_other_adapters_are_kept_and_have_no_effect(kind):
    model, bare = Parallel(), Parallel()
    ml.attach(model, ml.LoraConfig(r=2, target_modules=LINEARS), "mine")
    randomize_adapters_(model)
    mine = dict(adapter_layers(model))
    starts = [ALL[kind](each, config_of(), each.losses(data()))[1] for each in (model, bare)]
    assert adapter_layers(model) == mine
    assert all(set(layer.adapters) == {"mine"} for layer in mine.values())
    assert all(torch.equal(*pair) for path in LINEARS for pair in zip(*(start[path] for start in starts), strict=True))


@pytest.mark.parametrize("kind", ALL)
def test_a_start_of_a_decoder_changes_no_logits(kind):
    model, batch = tiny_model(WHOLE, dtype=torch.float32), collate(random_rows(2, 6), torch.device("cpu"))
    logits = model(IDS)
    config, start = ALL[kind](model, ml.LoraConfig(r=2, lora_alpha=6), (token_loss(model, each)[0] for each in [batch]))
    ml.attach(model, config, start=start)
    assert adapter_layers(model).keys() == start.keys()
    assert relative(model(IDS), logits, NEAR) < 1


@pytest.mark.parametrize("kind", KINDS)
def test_weights_in_four_bits_start_as_the_dense_ones_that_they_stand_for(kind):
    packed = four_bit(nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 8)))
    dense = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 8))
    for linear, base in ((dense[0], packed[0]), (dense[2], packed[2])):
        linear.weight.data, linear.bias.data = base.weight, base.bias.data
    starts = [
        KINDS[kind](model, ml.LoraConfig(r=2, target_modules=("0", "2")), (model(x).sum() for x in data()))[1]
        for model in (packed, dense)
    ]
    for path, factors in starts[0].items():
        assert all(
            relative(one.abs(), other.abs(), NEAR) < 1 for one, other in zip(factors, starts[1][path], strict=True)
        )


@pytest.mark.parametrize("kind", KINDS)
def test_losses_that_were_computed_before_are_refused(kind):
    model = Parallel()
    with pytest.raises(ml.TrainingError, match=r"no input reached \['narrow', 'other', 'wide'\]"):
        KINDS[kind](model, config_of(), list(model.losses(data())))


def theirs(peft, init, **more):
    fields = {"r": R, "lora_alpha": ALPHA, "target_modules": list(LINEARS), "init_lora_weights": init}
    return peft.LoraConfig(**fields, **more)


@pytest.mark.parity
@pytest.mark.filterwarnings("default")
def test_eva_of_inputs_of_mean_zero_has_peft_s_directions_ranks_and_alphas():
    peft = pytest.importorskip("peft")
    from tests.parity.theirs import assert_same_but_for_signs, theirs_factors

    model = peft.get_peft_model(Parallel(), theirs(peft, "eva", eva_config=peft.EvaConfig(rho=2.0, tau=0.9999)))
    others = {"prepare_model_inputs_fn": None, "prepare_layer_inputs_fn": None, "show_progress_bar": False}
    peft.initialize_lora_eva_weights(model, [torch.cat(data())], forward_fn=lambda model, x: model(x), **others)
    ours = Parallel()
    config, start = eva(ours, config_of(), ours.losses(data()))
    for path, (lora_A, lora_B) in start.items():
        assert_same_but_for_signs((lora_A.float(), lora_B), theirs_factors(model, path))
    their_config = model.peft_config["default"]
    assert set(config.target_modules) == set(their_config.target_modules)
    for path in start:
        assert config.rank(path) == their_config.rank_pattern.get(path, R)
        assert config.alpha(path) == their_config.alpha_pattern.get(path, ALPHA)


@pytest.mark.parity
@pytest.mark.filterwarnings("default")
def test_corda_moves_the_part_of_the_weight_that_peft_moves(monkeypatch):
    """How A and B share it differs: theirs depends on the largest input of a batch and on the rows in it."""
    peft = pytest.importorskip("peft")
    from tests.parity.theirs import ALLOWED, theirs_factors

    monkeypatch.setitem(sys.modules, "attr", dataclasses)  # whose `dataclass` PEFT wants, of a package it may lack
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    model, config, whole = Parallel(), theirs(peft, "corda", corda_config=CordaConfig()), torch.cat(data())
    preprocess_corda(model, config, run_model=lambda: model(whole))
    peft_model, ours = peft.get_peft_model(model, config), Parallel()
    for path, (lora_A, lora_B) in corda(ours, config_of(), ours.losses(data())).items():
        A, B = theirs_factors(peft_model, path)
        assert_parity((lora_B @ lora_A).float(), B @ A, ALLOWED)
