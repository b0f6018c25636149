"""Ours and PEFT's start values: the same factors but for signs, or the same product where it says how they share."""

import copy
import dataclasses
import math
import sys

import pytest
import torch
from torch import nn

from minilora.adapters.config import LoraConfig
from minilora.adapters.from_data import GAMMA, data_factors, redistributed
from minilora.adapters.initialize import embedding_factors, factors_from_weight, initial_factors, loftq_factors
from minilora.lora import AdapterLinear, lora_scale
from minilora.testing.compare import assert_parity
from tests.models import fill_, randn

pytestmark = pytest.mark.parity
peft = pytest.importorskip("peft")
pytest.importorskip("transformers")

ALLOWED = 1e-4  # of factors: singular vectors amplify float32's rounding by the inverse of their values' gaps
R, ALPHA = 4, 12


class Parallel(nn.Module):
    """Layers that see the same input, or what a fixed matrix makes of it: of mean zero, if the input's is."""

    def __init__(self):
        super().__init__()
        self.wide, self.narrow, self.other = nn.Linear(12, 20), nn.Linear(12, 8), nn.Linear(12, 15, bias=False)
        self.lookup, self.scan = nn.Embedding(10, 6), nn.Conv2d(4, 6, 3)
        fill_(self, 0)
        self.turn = 0.6 ** torch.arange(12) * randn(5, 12, 12, dtype=torch.float32)

    def forward(self, x):
        return torch.cat((self.wide(x), self.narrow(x), self.other(x @ self.turn)), dim=-1).tanh()

    def loss(self, x):
        return self(x).square().mean()


LINEARS = ("wide", "narrow", "other")


def data(seed=0):
    """Four batches, each of mean zero, along some directions more than along others."""
    spread = 0.8 ** torch.arange(12, dtype=torch.float32)
    halves = [spread * randn(seed + i, 40, 12, dtype=torch.float32) for i in range(4)]
    return [torch.cat((half, -half)) for half in halves]


def theirs_config(init, targets=LINEARS, **more):
    return peft.LoraConfig(r=R, lora_alpha=ALPHA, target_modules=list(targets), init_lora_weights=init, **more)


def theirs_model(init, targets=LINEARS, **more):
    return peft.get_peft_model(Parallel(), theirs_config(init, targets, **more))


def theirs_factors(model, path):
    layer = model.base_model.model.get_submodule(path)
    return layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()


def ours_factors(kind, batches):
    model = Parallel()
    losses = (model.loss(x) for x in batches)
    layers = {path: AdapterLinear(model.get_submodule(path), path) for path in LINEARS}
    config = LoraConfig(r=R, lora_alpha=ALPHA)
    return data_factors(kind, model, layers, config, losses, torch.Generator().manual_seed(0))


def assert_same_but_for_signs(ours, theirs):
    """A row of A and a column of B may both be turned round."""
    signs = (ours[0] * theirs[0]).sum(1).sign()
    assert_parity(signs.unsqueeze(1) * ours[0], theirs[0], ALLOWED)
    assert_parity(ours[1] * signs, theirs[1], ALLOWED)


def test_the_same_numbers_are_drawn():
    for path, shapes in (("wide", ((R, 12), (20, R))), ("scan", ((R, 4, 3, 3), (6, R, 1, 1)))):
        for kind in (True, "gaussian"):
            layer = theirs_model(True, [path]).base_model.model.get_submodule(path)
            torch.manual_seed(7)
            layer.reset_lora_parameters("default", kind)
            lora_A, lora_B = initial_factors(kind, *shapes, torch.Generator().manual_seed(7))
            assert_parity(lora_A, layer.lora_A["default"].weight)
            assert torch.equal(lora_B, layer.lora_B["default"].weight)
    layer = theirs_model(True, ["lookup"]).base_model.model.lookup
    torch.manual_seed(7)
    layer.reset_lora_parameters("default", True)
    lora_A, lora_B = embedding_factors(True, 10, 6, R, torch.Generator().manual_seed(7))
    assert torch.equal(lora_A, layer.lora_embedding_A["default"])
    assert torch.equal(lora_B, layer.lora_embedding_B["default"])


def test_orthogonal_factors_have_their_sizes_and_their_product_is_zero_there_too():
    torch.manual_seed(7)
    big = peft.get_peft_model(nn.Sequential(nn.Linear(3000, 2000)), theirs_config("orthogonal", ["0"]))
    theirs = theirs_factors(big, "0")
    ours = initial_factors("orthogonal", (R, 3000), (2000, R), torch.Generator().manual_seed(7))
    for our, their in zip(ours, theirs, strict=True):
        assert our.shape == their.shape
        assert abs(our.square().mean() / their.square().mean() - 1) < 12 * math.sqrt(4 / our.numel())
    for lora_A, lora_B in (ours, theirs):
        assert (lora_B @ lora_A).abs().max() < 1e-5 * lora_A.abs().max() * lora_B.abs().max()


@pytest.mark.parametrize("path", LINEARS)
@pytest.mark.parametrize("kind", ["pissa", "olora", "pissa_niter_300"])  # theirs has no column more than it needs
def test_what_moves_out_of_the_weight_is_the_same(kind, path):
    torch.manual_seed(0)
    theirs = theirs_model(kind)
    weight = Parallel().get_submodule(path).weight.detach()
    scale = lora_scale(R, ALPHA)
    ours = factors_from_weight(kind, weight, R, scale, torch.Generator().manual_seed(0))
    assert_same_but_for_signs(ours, theirs_factors(theirs, path))
    residual = theirs.base_model.model.get_submodule(path).base_layer.weight
    assert_parity(weight - scale * ours[1] @ ours[0], residual, ALLOWED)


def test_loftq_s_factors_are_theirs_of_the_same_rounding_and_divided_by_the_scale():
    """Theirs are not: with another scale than 1, PEFT's layer begins as Q + s·(W - Q) and not near W."""
    loftq_utils = pytest.importorskip("peft.utils.loftq_utils")
    weight, scale = Parallel().wide.weight.detach(), lora_scale(R, ALPHA)
    lora_A, lora_B, base = loftq_factors(weight, R, scale)
    theirs = loftq_utils._low_rank_decomposition(weight - base.weight, reduced_rank=R)
    root = math.sqrt(scale)
    assert_same_but_for_signs((root * lora_A, root * lora_B), (theirs["R"], theirs["L"]))


def test_eva_of_inputs_of_mean_zero_has_the_same_directions_ranks_and_alphas():
    model = theirs_model("eva", eva_config=peft.EvaConfig(rho=2.0, tau=0.9999))
    whole = [torch.cat(data())]
    others = {"prepare_model_inputs_fn": None, "prepare_layer_inputs_fn": None, "show_progress_bar": False}
    peft.initialize_lora_eva_weights(model, whole, forward_fn=lambda model, x: model(x), **others)
    ours = ours_factors("eva", data())
    for path, factors in ours.items():
        assert_same_but_for_signs(factors, theirs_factors(model, path))
    theirs = model.peft_config["default"]
    config = redistributed(
        LoraConfig(r=R, lora_alpha=ALPHA, target_modules=LINEARS, init_lora_weights="eva"),
        {path: len(lora_A) for path, (lora_A, _) in ours.items()},
    )
    assert set(config.target_modules) == set(theirs.target_modules)
    assert config.rank_pattern == {f"^{path}": r for path, r in theirs.rank_pattern.items()}
    assert config.alpha_pattern == {f"^{path}": alpha for path, alpha in theirs.alpha_pattern.items()}


def test_corda_moves_the_same_part_of_the_weight(monkeypatch):
    """How A and B share it differs: theirs depends on the largest input of a batch and on the rows in it."""
    monkeypatch.setitem(sys.modules, "attr", dataclasses)  # whose `dataclass` PEFT wants, of a package it may lack
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    model, config, whole = Parallel(), theirs_config("corda", corda_config=CordaConfig()), torch.cat(data())
    preprocess_corda(model, config, run_model=lambda: model(whole))
    theirs = peft.get_peft_model(model, config)
    for path, (lora_A, lora_B) in ours_factors("corda", data()).items():
        A, B = theirs_factors(theirs, path)
        assert_parity(lora_B @ lora_A, B @ A, ALLOWED)
        size = (A.norm() / lora_A.norm()).item()
        assert_same_but_for_signs((size * lora_A, lora_B / size), (A, B))


def test_lora_ga_has_the_same_directions_and_the_published_sizes():
    """Theirs multiplies B by the singular values of the gradient and leaves the stable scale out of A."""
    from peft.tuners.lora.loraga import preprocess_loraga

    torch.manual_seed(0)
    model, config = Parallel(), theirs_config("lora_ga", lora_ga_config=peft.LoraGAConfig())
    del model.lookup, model.scan
    gradients = {}

    def step():
        for x in data():
            model.loss(x).backward()
        gradients.update({path: model.get_submodule(path).weight.grad.clone() for path in LINEARS})

    preprocess_loraga(model, config, step)
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    for path, (lora_A, lora_B) in ours_factors("lora_ga", data()).items():
        A, B = theirs_factors(theirs, path)
        S = torch.linalg.svdvals(gradients[path] / len(data()))[R : 2 * R]
        zeta = lora_B.size(0) ** 0.25 / math.sqrt(GAMMA)
        assert_parity((lora_A * A).sum(1, keepdim=True).sign() * lora_A / zeta, A, ALLOWED)
        assert_parity((lora_B * B).sum(0).sign() * lora_B * S, B, ALLOWED)
