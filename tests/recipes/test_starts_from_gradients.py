"""LoRA-GA as its paper defines it, and as PEFT computes it where it is right."""

import copy
import math

import pytest
import torch
from hypothesis import given

from minilora.testing.compare import assert_parity, relative
from recipes.starts_from_gradients import GAMMA, lora_ga
from tests.models import examples, scales, seeds
from tests.recipes.test_starts_from_inputs import (
    LINEARS,
    NEAR,
    Parallel,
    R,
    assert_changes_nothing_trains_and_is_saved_as_a_plain_one,
    best,
    config_of,
    data,
    theirs,
)


@examples(0.3)
@given(seeds, scales)
def test_a_first_step_of_lora_ga_is_the_best_of_rank_2r_for_a_step_of_the_weight(seed, scale):
    model = Parallel(seed)
    sum(model.losses(data(seed))).backward()
    gradients = {path: model.get_submodule(path).weight.grad.clone() for path in LINEARS}
    model.zero_grad()
    start = lora_ga(model, config_of(alpha=R * scale), model.losses(data(seed)))
    for path, G in gradients.items():
        lora_A, lora_B = start[path]
        dA, dB = scale * lora_B.T @ G, scale * G @ lora_A.T  # law 5
        zeta = len(G) ** 0.25 / 4
        assert relative(scale * (dB @ lora_A + lora_B @ dA), (scale * zeta) ** 2 * best(G, 2 * R), 100 * NEAR) < 1
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())


def test_the_adapter_of_a_decoder_changes_nothing_trains_and_is_saved_as_a_plain_one(tmp_path):
    assert_changes_nothing_trains_and_is_saved_as_a_plain_one(
        lambda *arguments: (arguments[1], lora_ga(*arguments)), tmp_path
    )


@pytest.mark.parity
@pytest.mark.filterwarnings("default")
def test_lora_ga_has_peft_s_directions_and_the_published_sizes():
    """Theirs multiplies B by the singular values of the gradient and leaves the stable scale out of A."""
    peft = pytest.importorskip("peft")
    from peft.tuners.lora.loraga import preprocess_loraga

    from tests.parity.theirs import ALLOWED, theirs_factors

    torch.manual_seed(0)
    model, config = Parallel(), theirs(peft, "lora_ga", lora_ga_config=peft.LoraGAConfig())
    gradients = {}

    def step():
        for x in data():
            model.loss(x).backward()
        gradients.update({path: model.get_submodule(path).weight.grad.clone() for path in LINEARS})

    preprocess_loraga(model, config, step)
    peft_model, ours = peft.get_peft_model(copy.deepcopy(model), config), Parallel()
    for path, (lora_A, lora_B) in lora_ga(ours, config_of(), ours.losses(data())).items():
        A, B = theirs_factors(peft_model, path)
        S = torch.linalg.svdvals(gradients[path] / len(data()))[R : 2 * R]
        zeta = lora_B.size(0) ** 0.25 / math.sqrt(GAMMA)
        assert_parity((lora_A * A).sum(1, keepdim=True).sign() * lora_A / zeta, A, ALLOWED)
        assert_parity((lora_B * B).sum(0).sign() * lora_B * S, B, ALLOWED)
