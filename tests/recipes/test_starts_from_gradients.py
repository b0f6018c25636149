"""LoRA-GA as its paper defines it; test_starts_from_inputs has what it shares with others."""

import pytest
from hypothesis import given

import minilora as ml
from minilora.testing.compare import relative
from recipes.starts_from_gradients import lora_ga
from tests.models import examples, scales, seeds
from tests.recipes.test_starts_from_inputs import LINEARS, NEAR, Parallel, R, best, config_of, data


@examples(0.3)
@given(seeds, scales)
def test_a_first_step_is_the_best_of_rank_2r_for_a_step_of_the_weight(seed, scale):
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


def test_a_linear_that_no_loss_depends_on_is_refused():
    model = Parallel()
    with pytest.raises(ml.TrainingError, match="narrow: no loss depends on its weight"):
        lora_ga(model, config_of(), (model.wide(x).sum() for x in data()))
    assert not any(p.requires_grad for p in model.parameters())
