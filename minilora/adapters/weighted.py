"""Weighted sums of adapters: a new adapter of a model from those it has.

    ΔW = Σᵢ wᵢ·sᵢ·Bᵢ Aᵢ,    sᵢ the scale of adapter i,  wᵢ the weight that the user gives it

The sum is exact: its rank is the sum of the ranks, and its scale is 1 (alpha = r without rsLoRA).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from minilora.adapter import activate, layers_of
from minilora.adapters.attach import config_of_adapter, inject_layers
from minilora.adapters.build import has_ties, low_rank_layer
from minilora.adapters.config import LoraConfig, Task
from minilora.adapters.modules_to_save import ModulesToSave, Rows, TrainableTokens, TrainedCopy
from minilora.errors import ConfigError, TrainingError
from minilora.lora import AdapterWrapper, LoraAdapter, widest


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
    scaled = [part.scale * part.lora_B.to(widest(part.lora_B)) for part in parts]
    return Factors(torch.cat([part.lora_A.to(widest(part.lora_A)) for part in parts]), torch.cat(scaled, dim=1))


def combine_adapters(model: nn.Module, weights: Mapping[str, float], name: str) -> None:
    """Add several adapters, each times a weight, to a new one, and activate it; the others stay as they are.

    A weight of -1 subtracts an adapter. The new adapter is frozen. Modules and token rows that one of them has trained
    are carried over as they are, without the weight.

    Raises:
        ConfigError: a weight is not finite; an adapter has more than updates s·B A, which alone can be added; or two
            have trained one module in full or rows of it.
        TargetError: there is no such adapter, or one of the new name already.
        TrainingError: the sum is not finite.
    """
    held = {each: layers_of(model, each) for each in weights}
    task = config_of_adapter(model, next(iter(weights))).task_type if weights else None
    layers: dict[str, AdapterWrapper] = {}
    for each in held:
        own = _copied_in_full(held[each], each, name)
        if twice := sorted(own.keys() & layers):
            raise ConfigError(f"{twice[0]}: several of {list(weights)} have trained it in full, and only one can act")
        layers |= own
        held[each] = {path: layer for path, layer in held[each].items() if path not in own}
    adapters = [{path: layer.adapters[each] for path, layer in parts.items()} for each, parts in held.items()]
    for each, parts in zip(held, adapters, strict=True):
        if others := [path for path, adapter in parts.items() if not _is_update(adapter)]:
            raise ConfigError(
                f"{each}: cannot be combined with other adapters, or weighed: it has more than updates s·B A, which "
                "alone can be added, such as DoRA's m, trained biases, or a part of weights that are not "
                f"loaded: {others[:5]}"
            )
    if not any(adapters) or not all(map(math.isfinite, weights.values())):
        raise ConfigError(f"need adapters with updates and a finite weight for each, found {dict(weights)}")
    sums = {}
    for path in dict.fromkeys(path for parts in adapters for path in parts):
        present = [(parts[path], weights[each]) for each, parts in zip(held, adapters, strict=True) if path in parts]
        sums[path] = concatenate([Factors(a.lora_A.detach(), a.lora_B.detach(), w * a.scale) for a, w in present])
        if not sums[path].lora_B.isfinite().all():
            raise TrainingError(f"{path}: with the weights {dict(weights)} the sum is not finite")
    rows = {p: layer.adapters[name].ids.tolist() for p, layer in layers.items() if isinstance(layer, TrainableTokens)}
    full = tuple(path for path in layers if path not in rows)
    ranks = {path: len(factors.lora_A) for path, factors in sums.items()}
    combined = replace(config_of(ranks, task), modules_to_save=full, trainable_token_indices=rows or None)
    combined = replace(combined, ensure_weight_tying=has_ties(layers, name))
    bases = {path: layer.base for parts in held.values() for path, layer in parts.items()}
    for path, factors in sums.items():
        tensors = {"lora_A": factors.lora_A, "lora_B": factors.lora_B}
        layers[path] = low_rank_layer(bases[path], path, combined, name, tensors)
    inject_layers(model, layers, combined, name)
    activate(model, name, trainable=False)


def _copied_in_full(layers: Mapping[str, AdapterWrapper], old: str, new: str) -> dict[str, AdapterWrapper]:
    """Return new layers with copies of the modules and token rows that an adapter has trained; tied ones stay tied."""
    found: dict[str, AdapterWrapper] = {}
    copies: dict[Any, TrainedCopy] = {}  # by the weight that they are of
    rows: dict[nn.Parameter, nn.Parameter] = {}
    for path, layer in layers.items():
        adapter = layer.adapters[old]
        if isinstance(adapter, TrainedCopy) and adapter.is_whole:
            tensors = {key: tensor.detach().clone() for key, tensor in adapter.tensors().items()}
            weight = adapter.copy._parameters.get("weight", path)
            copied = TrainedCopy(layer.base, tensors, copies.get(weight))
            copies.setdefault(weight, copied)
            found[path] = ModulesToSave(layer.base, path, {new: copied})
        elif isinstance(adapter, Rows):
            copy = rows.setdefault(adapter.rows, nn.Parameter(adapter.rows.detach().clone()))
            found[path] = TrainableTokens(layer.base, path, {new: Rows(adapter.ids.tolist(), copy, adapter.is_shared)})
    return found


def _is_update(adapter: nn.Module) -> bool:
    """Return whether an adapter is an update s·B A and nothing else, of numbers that are there."""
    return (
        isinstance(adapter, LoraAdapter)
        and adapter.magnitude is adapter.bias is adapter.lora_bias is None
        and not any(buffer.is_meta for buffer in adapter.buffers())
    )


def config_of(ranks: Mapping[str, int], task_type: Task | None) -> LoraConfig:
    """Return the config of an adapter of scale 1, with alpha = r for each module."""
    r = max(ranks.values())
    others = {f"^{path}": rank for path, rank in ranks.items() if rank != r}
    patterns: dict[str, Any] = {"rank_pattern": others, "alpha_pattern": others}
    return LoraConfig(r, r, target_modules=tuple(ranks), task_type=task_type, **patterns)
