"""LoRA+: the rates of PEFT, and what they do."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import minilora as ml
from minilora.adapter import adapter_layers
from minilora.testing.compare import assert_maths, assert_parity
from minilora.training import adamw
from recipes.loraplus import groups
from tests.models import examples, seeds, tiny_model
from tests.training import adapted, random_rows, trained

RATE, RATIO = 3e-4, 8.0
CONFIGS = {
    "plain": {"target_modules": ["q_proj", "down_proj"]},
    "magnitudes": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "biases": {"target_modules": ["q_proj"], "bias": "all", "lora_bias": True},
    "an embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "copies": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "model.norm"]},
    "token rows": {"target_modules": ["q_proj"], "trainable_token_indices": [1, 3]},
}


def by_rate(found):
    """Rate -> shapes of what has it, in order."""
    rates = {}
    for group in found:
        rates.setdefault(round(group["lr"], 12), []).extend(tuple(p.shape) for p in group["params"])
    return {rate: sorted(shapes) for rate, shapes in rates.items() if shapes}


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CONFIGS)
def test_every_tensor_has_the_rate_that_peft_gives_it(case, tmp_path):
    peft = pytest.importorskip("peft")
    loraplus = pytest.importorskip("peft.optimizers.loraplus")
    transformers = pytest.importorskip("transformers")
    ours = tiny_model("llama-bias-tied-wide-heads", dtype=torch.float32, tie_word_embeddings=False)
    ml.save_model(ours, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ml.attach(ours, ml.LoraConfig(r=3, lora_alpha=21, **CONFIGS[case]))
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=3, lora_alpha=21, **CONFIGS[case]))
    optimizer = loraplus.create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=RATE, loraplus_lr_ratio=RATIO, loraplus_lr_embedding=1e-6
    )
    assert len(by_rate(optimizer.param_groups)) > 1
    assert by_rate(groups(ours, RATE, RATIO)) == by_rate(optimizer.param_groups)


def run(seed, ratio, scale=1.0, **config):
    model = adapted(layers=1)
    for layer in adapter_layers(model).values():
        adapter = layer.adapters["default"]
        adapter.lora_B.data /= scale
        adapter.scale *= scale
    config, losses = ml.TrainConfig(max_grad_norm=0, **config), []
    build = lambda parameters: adamw(groups(model, config.learning_rate, ratio))  # noqa: E731
    ml.train(model, random_rows(seed, 4), config, lambda record: losses.append(record["loss"]), optimizer=build)
    return losses, {name: p.detach() * (scale if "lora_B" in name else 1) for name, p in trained(model).items()}


@examples(0.3)
@given(seeds, st.sampled_from([0.5, 4.0, 16.0]))
def test_the_first_step_moves_a_and_b_each_by_its_own_rate(seed, ratio):
    """LoRA+ §4: whatever the rate of B, A goes where it would go; and the other way round."""
    _, found = run(seed, ratio, max_steps=1)
    _, slow = run(seed, 1.0, max_steps=1)
    _, fast = run(seed, 1.0, max_steps=1, learning_rate=2e-4 * ratio)
    for name, value in found.items():
        assert_maths(value, (slow if name.endswith("lora_A") else fast)[name])
        assert not torch.equal(slow[name], fast[name]), name


@pytest.mark.parametrize("scheduler", ["cosine", "linear"])
def test_with_adam_it_is_a_larger_alpha(scheduler):
    """λ·s·B′ A at one rate learns what s·B A learns with λ times the rate of B, in all steps of a schedule."""
    config = {"epochs": 3, "batch_size": 2, "lr_scheduler": scheduler, "warmup_steps": 0.3, "learning_rate": 0.01}
    losses, found = run(1, 8.0, **config)
    others, same = run(1, 1.0, scale=8.0, **config)
    assert losses[-1] < losses[0]
    for one, other in [*zip(losses, others, strict=True), *((found[name], same[name]) for name in found)]:
        assert_parity(torch.as_tensor(one), torch.as_tensor(other), 1e-4)  # ε of Adam is another share of λ·g than of g
