"""AdamW: with which rate each parameter learns, and how the rate changes over a run.

LoRA+ gives B a higher rate than A: with one rate for both, one of them learns inefficiently in wide layers.

    [AdamW]  Loshchilov & Hutter 2017, Decoupled Weight Decay Regularization
    [SGDR]   Loshchilov & Hutter 2016, SGDR: Stochastic Gradient Descent with Warm Restarts
    [LoRA+]  Hayou et al. 2024, LoRA+: Efficient Low Rank Adaptation of Large Models
"""

from __future__ import annotations

import math

import torch
from torch import nn

from minilora.adapters.find import adapter_layers
from minilora.errors import ConfigError
from minilora.runs.config import TrainConfig
from minilora.runs.flat import Flat, Learning

EMBEDDING_RATE = 1e-6  # of the factors of an adapted embedding in LoRA+, as in PEFT


def adamw(flat: Flat, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW on each segment, in one fused kernel, which torch has for CPU, CUDA and MPS."""
    groups = [{"params": [each.values], **each.learning._asdict()} for each in flat.segments]
    return torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)


def learning(model: nn.Module, config: TrainConfig) -> dict[str, Learning]:
    """Name -> how it learns, of all that requires grad.

    Weight decay pulls on matrices alone: biases, norms and magnitudes have no reason to be near 0.

    Raises:
        ConfigError: `loraplus_lr_ratio` is given, and no factor of an adapter is trained.
    """
    return {
        name: Learning(factor, config.weight_decay if model.get_parameter(name).dim() > 1 else 0.0)
        for name, factor in rate_factors(model, config).items()
    }


def rate_factors(model: nn.Module, config: TrainConfig) -> dict[str, float]:
    """Name of a trained parameter -> its rate, as a multiple of `learning_rate`  [LoRA+ §4].

    With `loraplus_lr_ratio`, B and all vectors (biases, magnitudes) have that multiple; A, and what is trained beside
    adapters, have the rate itself; the factors of an adapted embedding have `EMBEDDING_RATE`.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    ratio = config.loraplus_lr_ratio
    if ratio is None:
        return dict.fromkeys(trained, 1.0)
    factors = [name for name in trained if _is_factor(name, "lora_A") or _is_factor(name, "lora_B")]
    if not factors:
        raise ConfigError("TrainConfig: loraplus_lr_ratio is for adapters, and no lora_A or lora_B is trained")
    embeddings = [f"{path}." for path, layer in adapter_layers(model).items() if isinstance(layer.base, nn.Embedding)]

    def factor(name: str, parameter: nn.Parameter) -> float:
        if name in factors and name.startswith(tuple(embeddings)):
            return EMBEDDING_RATE / config.learning_rate
        return ratio if _is_factor(name, "lora_B") or parameter.dim() == 1 else 1.0

    return {name: factor(name, parameter) for name, parameter in trained.items()}


def _is_factor(name: str, factor: str) -> bool:
    return factor in name.split(".")


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Let the next step have this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["factor"]


def learning_rate(step: int, total: int, config: TrainConfig) -> float:
    """The learning rate of step 0 ≤ step < total: up linearly in the warm-up, then down to 0  [SGDR eq. 5].

    The warm-up's first step has 1/warm-up of the full rate, and the last step of all is not wasted on a rate of 0.
    """
    warmup = int(config.warmup_steps)
    if config.warmup_steps < 1:
        warmup = math.ceil(round(config.warmup_steps * total, 9))  # 0.07 * 100 is a little more than 7
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    falls = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
    return config.learning_rate * falls[config.lr_scheduler]
