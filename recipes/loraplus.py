"""LoRA+: B learns λ times as fast as A, since one rate for both learns one of them inefficiently in wide layers.

    A ← A - η·u_A,    B ← B - λ·η·u_B,    u: the updates of AdamW at rate 1   [LoRA+ §4]

`groups` are for any optimizer, and have the rates of PEFT's `create_loraplus_optimizer`. Vectors (biases, magnitudes)
learn as B does; an adapted embedding has a rate of its own, and what is trained in full that of A.

    losses = train(model, dataset, ml.TrainConfig(learning_rate=1e-4), ratio=16)

With Adam, whose updates do not depend on the scale of a gradient, LoRA+ is a larger alpha: s·B A learns at λ·η what
λ·s·B′ A learns at η, B′ = B/λ (except for ε and clipping). So `lora_alpha=32 * 16` does without a recipe.

    [LoRA+]  Hayou et al. 2024, LoRA+: Efficient Low Rank Adaptation of Large Models
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import minilora as ml
from minilora.adapter import adapter_layers
from minilora.data import collate
from minilora.training import adamw, learning_rate, train_step


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


def train(model: nn.Module, dataset: Sequence[ml.Example], config: ml.TrainConfig, ratio: float) -> list[float]:
    """Train an adapter and return the loss of each step; of the config, the rates, the rows and clipping count."""
    optimizer = adamw(groups(model, config.learning_rate, ratio))
    peaks = [group["lr"] for group in optimizer.param_groups]
    generator = torch.Generator().manual_seed(config.seed)
    order = [torch.randperm(len(dataset), generator=generator) for _ in range(math.ceil(config.epochs))]
    steps = torch.cat(order).split(config.batch_size)[: config.max_steps]
    warmup = config.warmup_steps if config.warmup_steps >= 1 else config.warmup_steps * len(steps)
    device = next(model.parameters()).device
    losses = []
    for step, rows in enumerate(steps):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = learning_rate(step, len(steps), peak, math.ceil(warmup), config.lr_scheduler)
        batch = collate([dataset[row] for row in rows.tolist()], device)
        losses.append(train_step(model, optimizer, [batch], max_grad_norm=config.max_grad_norm).loss)
    return losses
