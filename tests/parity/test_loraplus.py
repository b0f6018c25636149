"""LoRA+ beside PEFT's: the same rate for the same tensor."""

import pytest
import torch

import minilora as ml
from minilora.runs.objective import rate_factors
from tests.models import tiny_model

pytestmark = pytest.mark.parity
peft = pytest.importorskip("peft")
loraplus = pytest.importorskip("peft.optimizers.loraplus")
transformers = pytest.importorskip("transformers")

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
    for rate, shape in found:
        rates.setdefault(round(rate, 12), []).append(tuple(shape))
    return {rate: sorted(shapes) for rate, shapes in rates.items()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CONFIGS)
def test_every_tensor_has_the_rate_that_peft_gives_it(case, tmp_path):
    ours = tiny_model("llama-bias-tied-wide-heads", dtype=torch.float32, tie_word_embeddings=False)
    ml.save_model(ours, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ml.attach(ours, ml.LoraConfig(r=3, lora_alpha=21, **CONFIGS[case]))
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=3, lora_alpha=21, **CONFIGS[case]))
    optimizer = loraplus.create_loraplus_optimizer(
        theirs, torch.optim.AdamW, lr=RATE, loraplus_lr_ratio=RATIO, loraplus_lr_embedding=1e-6
    )
    expected = by_rate((group["lr"], p.shape) for group in optimizer.param_groups for p in group["params"])
    assert len(expected) > 1
    found = rate_factors(ours, ml.TrainConfig(learning_rate=RATE, loraplus_lr_ratio=RATIO))
    assert by_rate((RATE * factor, ours.get_parameter(name).shape) for name, factor in found.items()) == expected
