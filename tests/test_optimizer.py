"""With which rate each parameter learns: LoRA+, and what weight decay pulls on."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim.optimizer import register_optimizer_step_post_hook

import minilora as ml
from minilora.runs.objective import EMBEDDING_RATE, build_optimizer, rate_factors, rate_of_step
from minilora.testing.compare import assert_maths
from tests.models import examples, seeds, tiny_model
from tests.training import adapted, random_rows, trained

RATE = 0.01


def run(rows, directory=None, on_step=None, model=None, **config):
    model = model or adapted(use_dora=True, layers=1)
    ml.train(model, rows, ml.TrainConfig(**{"learning_rate": RATE, **config}), on_step, checkpoint_dir=directory)
    return {name: p.detach().clone() for name, p in trained(model).items()}


@examples(0.3)
@given(seeds, st.sampled_from([0.5, 4.0, 16.0]))
def test_the_first_step_moves_a_as_its_rate_says_and_b_and_magnitudes_as_that_times_the_ratio_does(seed, ratio):
    """LoRA+ §4: whatever the rate of B, A goes where it would go; and the other way round."""
    rows, config = random_rows(seed, 4), {"max_steps": 1}
    found = run(rows, loraplus_lr_ratio=ratio, **config)
    slow, fast = run(rows, **config), run(rows, learning_rate=RATE * ratio, **config)
    for name, value in found.items():
        assert_maths(value, (slow if name.endswith("lora_A") else fast)[name])
        assert not torch.equal(slow[name], fast[name]), name


@pytest.mark.parametrize("scheduler", ["cosine", "linear"])
def test_the_schedule_keeps_the_ratio(scheduler):
    rates, config = [], {"lr_scheduler": scheduler, "warmup_steps": 2, "batch_size": 1}
    hook = register_optimizer_step_post_hook(
        lambda optimizer, *_: rates.append(sorted(group["lr"] for group in optimizer.param_groups))
    )
    try:
        run(random_rows(1, 6), loraplus_lr_ratio=8, **config)
    finally:
        hook.remove()
    expected = [rate_of_step(step, 6, ml.TrainConfig(learning_rate=RATE, **config)) for step in range(6)]
    assert rates == [[rate, 8 * rate] for rate in expected]  # A; B and magnitudes, which are one while nothing decays


def test_an_adapted_embedding_has_a_small_rate_of_its_own_and_without_a_ratio_all_else_the_rate_itself():
    model = adapted(use_dora=True)
    assert rate_factors(model, ml.TrainConfig()) == dict.fromkeys(trained(model), 1.0)
    model = tiny_model()
    ml.attach(model, ml.LoraConfig(r=2, target_modules=("embed_tokens", "q_proj"), modules_to_save=("norm",)))
    factors = rate_factors(model, ml.TrainConfig(learning_rate=RATE, loraplus_lr_ratio=8))
    embedding = {name: factor for name, factor in factors.items() if "embed_tokens" in name}
    assert list(embedding.values()) == [EMBEDDING_RATE / RATE] * 2
    for name in factors.keys() - embedding.keys():
        assert factors[name] == (1 if name.endswith("lora_A") else 8), name  # a norm's copy is a vector


def test_a_ratio_needs_an_adapter():
    with pytest.raises(ml.ConfigError, match="loraplus_lr_ratio is for adapters"):
        run(random_rows(1, 2), model=tiny_model(), loraplus_lr_ratio=4)


def test_weight_decay_pulls_on_matrices_alone():
    model = tiny_model("llama-bias-tied-wide-heads")
    groups = build_optimizer(model, ml.TrainConfig(weight_decay=0.3)).param_groups
    expected = {name: 0.3 if p.dim() == 2 else 0.0 for name, p in model.named_parameters()}
    assert {name: group["weight_decay"] for group in groups for name in group["names"]} == expected
    assert {group["weight_decay"] for group in build_optimizer(model, ml.TrainConfig()).param_groups} == {0.0}
