"""LoRA+: B learns λ times as fast as A, since one rate for both learns one of them inefficiently in wide layers.

    A ← A - η·u_A,    B ← B - λ·η·u_B,    u: the updates of AdamW at rate 1   [LoRA+ §4]

`groups` are for any optimizer, and have the rates of PEFT's `create_loraplus_optimizer`. Vectors (biases, magnitudes)
learn as B does; an adapted embedding has a rate of its own, and what is trained in full that of A.

    ml.train(model, dataset, config, optimizer=lambda parameters: adamw(groups(model, rate=1e-4, ratio=16)))

With Adam, whose updates do not depend on the scale of a gradient, LoRA+ is a larger alpha: s·B A learns at λ·η what
λ·s·B′ A learns at η, B′ = B/λ (except for ε and clipping). So `lora_alpha=32 * 16` does without a recipe.

    [LoRA+]  Hayou et al. 2024, LoRA+: Efficient Low Rank Adaptation of Large Models
"""

from collections import defaultdict
from typing import Any

from torch import nn

from minilora.adapter import adapter_layers


def groups(model: nn.Module, rate: float, ratio: float, embedding_rate: float = 1e-6) -> list[dict[str, Any]]:
    """Return what is trained of a model in groups of one learning rate each."""
    layers = adapter_layers(model)
    embeddings = tuple(f"{path}." for path, layer in layers.items() if isinstance(layer.base, nn.Embedding))
    found = defaultdict(list)
    for name, parameter in model.named_parameters():
        factors = {"lora_A", "lora_B"} & {*name.split(".")}
        if not parameter.requires_grad:
            continue
        if factors and name.startswith(embeddings):
            found[embedding_rate].append(parameter)
        elif "lora_B" in factors or parameter.dim() == 1:
            found[ratio * rate].append(parameter)
        else:
            found[rate].append(parameter)
    return [{"params": parameters, "lr": lr} for lr, parameters in found.items()]
