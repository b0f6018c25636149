"""Which parameters learn with which rate.

LoRA+ gives B a higher rate than A: with one rate for both, one of them learns inefficiently in wide layers.

    [LoRA+]  Hayou et al. 2024, LoRA+: Efficient Low Rank Adaptation of Large Models
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from minilora.adapter import adapter_layers
from minilora.errors import ConfigError
from minilora.runs.config import TrainConfig
from minilora.training import adamw, learning_rate

EMBEDDING_RATE = 1e-6  # of the factors of an adapted embedding in LoRA+, as in PEFT


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Build AdamW over what of the model requires grad, in groups that learn alike.

    Each group has its rate as a multiple of the run's, `factor`, and the `names` of its parameters. Weight decay pulls
    on matrices alone: biases, norms and magnitudes have no reason to be near 0.

    Raises:
        ConfigError: `loraplus_lr_ratio` is given, and no factor of an adapter is trained.
    """
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, factor in rate_factors(model, config).items():
        parameter = model.get_parameter(name)
        decay = config.weight_decay if parameter.dim() > 1 else 0.0
        group = groups.setdefault((factor, decay), {"params": [], "names": []})
        group["params"].append(parameter)
        group["names"].append(name)
    return adamw({**group, "factor": key[0], "weight_decay": key[1]} for key, group in groups.items())


def trained_parameters(optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    """Return the parameters of an optimizer by name."""
    pairs = (zip(group["names"], group["params"], strict=True) for group in optimizer.param_groups)
    return {name: parameter for group in pairs for name, parameter in group}


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


def rate_of_step(step: int, total: int, config: TrainConfig) -> float:
    """Compute the learning rate of step 0 ≤ step < total; see `training.learning_rate`."""
    warmup = int(config.warmup_steps)
    if config.warmup_steps < 1:
        warmup = math.ceil(round(config.warmup_steps * total, 9))  # 0.07 * 100 is a little more than 7
    return learning_rate(step, total, config.learning_rate, warmup, config.lr_scheduler)
