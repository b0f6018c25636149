"""Weighted sums of adapters: a new adapter of a model from those it has.

    ΔW = Σᵢ wᵢ·sᵢ·Bᵢ Aᵢ,    sᵢ the scale of adapter i,  wᵢ the weight that the user gives it

The sum is exact: its rank is the sum of the ranks, and its scale is 1 (alpha = r without rsLoRA).
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minilora.adapter import activate, base_modules, layers_of
from minilora.adapters.attach import inject_layers
from minilora.adapters.build import low_rank_layer
from minilora.adapters.config import LoraConfig
from minilora.adapters.files import config_of_adapter
from minilora.errors import ConfigError, TrainingError
from minilora.lora import LoraAdapter, widest


class Factors(NamedTuple):
    """The factors of an adapter at one module: ΔW = scale · lora_B lora_A.

    Shapes: lora_A (r, in), lora_B (out, r)
    """

    lora_A: Tensor
    lora_B: Tensor
    scale: float = 1.0


def concatenate(parts: Sequence[Factors]) -> Factors:
    """Add adapters by concatenating their ranks: Σ sᵢ·Bᵢ Aᵢ = [s₁B₁ s₂B₂ …][A₁; A₂; …], exactly.

    >>> A, B = torch.ones(1, 3), torch.ones(2, 1)
    >>> concatenate([Factors(A, B, 2.0), Factors(A, B, -6.0)]).lora_B
    tensor([[ 2., -6.],
            [ 2., -6.]])
    """
    # In float64, so that s·B is rounded once; on the CPU, since some devices lack float64.
    scaled = [(part.scale * part.lora_B.cpu().double()).to(part.lora_B.device, widest(part.lora_B)) for part in parts]
    return Factors(torch.cat([part.lora_A.to(widest(part.lora_A)) for part in parts]), torch.cat(scaled, dim=1))


def combine_adapters(model: nn.Module, weights: Mapping[str, float], name: str) -> None:
    """Add several adapters, each times a weight, to a new one, and activate it; the others stay as they are.

    A weight of -1 subtracts an adapter. The new adapter is frozen. All its modules have the rank of the largest sum,
    smaller ones padded with zeros, and alpha = r. So tools that ignore rsLoRA and patterns compute the same.

    Raises:
        ConfigError: a weight is not finite, or an adapter has other parameters than A and B.
        TargetError: there is no such adapter, or one of the new name already.
        TrainingError: the sum is not finite.
    """
    parts: dict[str, list[Factors]] = {}
    bases: dict[str, nn.Module] = {}
    for old, weight in weights.items():
        for path, layer in layers_of(model, old).items():
            adapter = layer.adapters[old]
            is_there = not any(buffer.is_meta for buffer in adapter.buffers())
            if not (is_there and isinstance(adapter, LoraAdapter) and adapter.tensors().keys() == {"lora_A", "lora_B"}):
                raise ConfigError(
                    f"{old}: cannot be combined with other adapters, or given a weight: in {path} it has more than an "
                    "update s·B A: DoRA's m, a trained bias, a module in full, or a part of weights that are not loaded"
                )
            factors = Factors(adapter.lora_A.detach(), adapter.lora_B.detach(), weight * adapter.scale)
            parts.setdefault(path, []).append(factors)
            bases[path] = layer.base
    if not parts or not all(map(math.isfinite, weights.values())):
        raise ConfigError(f"need adapters with updates and a finite weight for each, found {dict(weights)}")
    sums = {path: concatenate(factors) for path, factors in parts.items()}
    if bad := [path for path, factors in sums.items() if not factors.lora_B.isfinite().all()]:
        raise TrainingError(f"{bad[0]}: with the weights {dict(weights)} the sum is not finite")
    r = max(len(factors.lora_A) for factors in sums.values())
    first = next(iter(weights))
    task = config_of_adapter(layers_of(model, first), first).task_type
    config = LoraConfig(r, r, target_modules=tuple(sums), task_type=task)
    layers = {}
    for path, (lora_A, lora_B, _) in sums.items():
        missing = r - len(lora_A)
        tensors = {"lora_A": F.pad(lora_A, (0, 0, 0, missing)), "lora_B": F.pad(lora_B, (0, missing))}
        layers[path] = low_rank_layer(bases[path], path, config, name, tensors)
    inject_layers(base_modules(model), layers, config, name)
    activate(model, name, trainable=False)
