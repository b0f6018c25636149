"""Combine adapters by sign election or random dropping (TIES, DARE), with less interference than in a sum.

    ΔWᵢ = sᵢ·Bᵢ Aᵢ of adapter i,  wᵢ its weight,  d the density
    TIES  keep the d·n numbers of ΔWᵢ of largest size. Of each number, the mean of wᵢ·ΔWᵢ over the adapters
          whose number has the elected sign, that of Σ ΔWᵢ                                         [TIES alg. 1]
    DARE  keep each number of ΔWᵢ with probability d, and divide it by d, so that its mean stays       [DARE §3]

The result is cut to a rank and becomes a new adapter of the model. Weights do not vote, as in PEFT, whose types these
are: `combine(…)` is "ties_svd", with `elect=False` "magnitude_prune_svd", with `dare=True` "dare_ties_svd", and with
both "dare_linear_svd"; with `density=1, elect=False` it is "svd", the sum cut to a rank. PEFT's types without `_svd`
treat A and B in this way, which the papers do not.

    ml.load_adapter(model, "first", "a")
    ml.load_adapter(model, "second", "b")
    combine(model, {"a": 0.7, "b": 0.3}, "both", r=16, density=0.5)
    ml.save_adapter(model, "combined", "both")

    [TIES]  Yadav et al. 2023, TIES-Merging: Resolving Interference When Merging Models
    [DARE]  Yu et al. 2023, Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

import minilora as ml
from minilora.adapter import layers_of
from minilora.lora import LoraAdapter, lora_delta


@torch.no_grad()
def combine(
    model: nn.Module,
    weights: Mapping[str, float],
    name: str,
    r: int,
    density: float,
    elect: bool = True,
    dare: bool = False,
    seed: int = 0,
) -> None:
    """Attach an adapter that combines those of `weights`, of linears; the others stay as they are."""
    generator, updates = torch.Generator().manual_seed(seed), {}
    for each, weight in weights.items():
        for path, layer in layers_of(model, each).items():
            adapter = layer.adapters[each]
            if not is_update(adapter):
                raise ml.ConfigError(f"{each}: is more than the updates s·B A, so it cannot be combined")
            delta = lora_delta(adapter.lora_A, adapter.lora_B, adapter.scale)
            if r > min(delta.shape):
                raise ml.ConfigError(f"{path}: rank {r} is more than {min(delta.shape)}, that of a whole update")
            kept = drop(delta, density, generator) if dare else keep_largest(delta, density)
            updates.setdefault(path, []).append((kept, weight * kept))
    ml.attach(model, ml.LoraConfig(r=r, lora_alpha=r, target_modules=tuple(updates)), name)
    for path, layer in layers_of(model, name).items():
        kept, weighted = (torch.stack(tensors) for tensors in zip(*updates[path], strict=True))
        U, S, Vh = torch.linalg.svd(merge_by_sign(kept, weighted) if elect else weighted.sum(0), full_matrices=False)
        root = S[:r].sqrt()
        layer.adapters[name].lora_A.copy_(root[:, None] * Vh[:r])
        layer.adapters[name].lora_B.copy_(U[:, :r] * root)


def is_update(adapter: nn.Module) -> bool:
    """Return whether an adapter is s·B A alone, without DoRA's m, biases or copies of modules."""
    parts = ("magnitude", "bias", "lora_bias")
    return isinstance(adapter, LoraAdapter) and all(getattr(adapter, part) is None for part in parts)


def merge_by_sign(kept: Tensor, weighted: Tensor) -> Tensor:
    """Return for each number the mean of those whose sign is that of the sum; 0 where none is.

    Shapes: kept (adapters, out, in), weighted (adapters, out, in) -> (out, in)
    """
    elected = kept.sign() == torch.where(kept.sum(0) >= 0, 1, -1)
    return (weighted * elected).sum(0) / elected.sum(0).clamp(min=1)


def keep_largest(tensor: Tensor, density: float) -> Tensor:
    """Keep the ⌊density·n⌋ numbers of largest size, and set the others to 0."""
    flat = tensor.flatten()
    chosen = flat.abs().topk(int(density * flat.numel())).indices
    return torch.zeros_like(flat).index_copy(0, chosen, flat[chosen]).view_as(tensor)


def drop(tensor: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Return T ∘ mask / density, mask ~ Bernoulli(density), whose mean is T."""
    keep = torch.bernoulli(torch.full(tensor.shape, density), generator=generator)
    return tensor * keep.to(tensor.device) / density
