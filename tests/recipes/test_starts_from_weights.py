"""OLoRA and LoftQ as their papers define them, and as PEFT computes them where it is right."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

import minilora as ml
from minilora.adapter import adapter_layers
from minilora.nf4 import NF4Linear
from minilora.testing.compare import assert_parity, relative
from recipes.starts_from_weights import attach_loftq, best_factors, olora
from tests.models import (
    WHOLE,
    best_of_rank,
    fill_,
    four_bit,
    randn,
    scales,
    seeds,
    sizes,
    tiny_model,
    token_ids,
)

NEAR = 1e-5  # of what float32 decompositions amplify
IDS = token_ids(0, 2, 7)


def filled(module):
    fill_(module, 0)
    return module


def one_linear(weight, r, scale):
    """A model of one linear with this weight, and a config for it."""
    model = nn.Sequential(nn.Linear(*reversed(weight.shape)))
    model[0].weight.data.copy_(weight)
    return model, ml.LoraConfig(r=r, lora_alpha=r * scale, target_modules=("0",))


@pytest.mark.parametrize("start_of", [olora, attach_loftq])
def test_other_adapters_are_kept(start_of):
    model, config = one_linear(randn(0, 20, 12), 4, 0.5)
    ml.attach(model, config, "mine")
    mine = model[0].adapters["mine"]
    start_of(model, config)
    assert model[0].adapters["mine"] is mine


@given(seeds, st.integers(1, 40), st.integers(2, 20), sizes, scales)
def test_loftq_leaves_of_the_rounding_only_what_its_rank_cannot_say(seed, inner, outer, r, scale):
    assume(r <= min(inner, outer))
    model, config = one_linear(randn(seed, outer, inner, dtype=torch.float32), r, scale)
    weight, bias = model[0].weight.detach(), model[0].bias.detach()
    attach_loftq(model, config)
    layer, Q = model[0], NF4Linear.quantize(weight)
    assert torch.equal(layer.base.weight, Q.weight)
    assert torch.equal(layer.base.bias, bias)
    rounding = (weight - Q.weight).double()
    best, S = best_of_rank(rounding, r)
    adapter = layer.adapters["default"]
    assert adapter.scale == scale
    assert relative(scale * adapter.lora_B @ adapter.lora_A, best, 10 * NEAR) < 1
    left = torch.linalg.matrix_norm(rounding - scale * (adapter.lora_B @ adapter.lora_A).double()).item()
    assert left == pytest.approx(np.linalg.norm(S[r:]), rel=NEAR, abs=NEAR * S[0])


def test_a_model_in_four_bits_with_loftq_is_nearer_to_the_dense_one(tmp_path):
    model = tiny_model(WHOLE, dtype=torch.float32)
    before = model(IDS)
    attach_loftq(model, ml.LoraConfig(r=8, lora_alpha=24))
    assert {type(layer.base) for layer in adapter_layers(model).values()} == {NF4Linear}
    started = model(IDS)
    with ml.disable_adapter(model):
        rounded = model(IDS)
    assert 0 < (started - before).norm() < 0.8 * (rounded - before).norm()
    ml.save_adapter(model, tmp_path)
    again = four_bit(tiny_model(WHOLE, dtype=torch.float32))
    ml.load_adapter(again, tmp_path)
    assert torch.equal(again(IDS), started)


@pytest.mark.parity
@pytest.mark.filterwarnings("default")
def test_olora_moves_out_of_the_weight_what_peft_moves():
    peft = pytest.importorskip("peft")
    from tests.parity.theirs import ALLOWED, assert_same_but_for_signs, theirs_factors

    linear, theirs = (filled(nn.Linear(12, 20)) for _ in range(2))
    factors = olora(nn.Sequential(linear), ml.LoraConfig(r=4, lora_alpha=12, target_modules=("0",)))["0"]
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=["0"], init_lora_weights="olora")
    model = peft.get_peft_model(nn.Sequential(theirs), config)
    assert_same_but_for_signs(factors, theirs_factors(model, "0"))
    lora_A, lora_B = factors
    assert_parity(linear.weight - 3 * lora_B @ lora_A, model.base_model.model[0].base_layer.weight, ALLOWED)


@pytest.mark.parity
@pytest.mark.filterwarnings("default")
def test_loftq_s_factors_are_peft_s_divided_by_the_scale():
    """Theirs are not: with another scale than 1, PEFT's layer begins as Q + s·(W - Q) and not near W."""
    loftq_utils = pytest.importorskip("peft.utils.loftq_utils")
    from tests.parity.theirs import assert_same_but_for_signs

    weight, scale = filled(nn.Linear(12, 20)).weight.detach(), 3.0
    rounding = weight - NF4Linear.quantize(weight).weight
    theirs = loftq_utils._low_rank_decomposition(rounding, reduced_rank=4)
    ours = [math.sqrt(scale) * factor for factor in best_factors(rounding / scale, 4)]
    assert_same_but_for_signs(ours, (theirs["R"], theirs["L"]))
