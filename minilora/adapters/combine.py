"""Combine several adapters into one, and approximate a change of a weight by an adapter: tensors only.

    ΔW = Σᵢ wᵢ·sᵢ·Bᵢ Aᵢ,    A (r, in),  B (out, r),  sᵢ the scale of adapter i,  wᵢ the weight that the user gives it

The result has scale 1 (alpha = r without rsLoRA), whatever the scales of the adapters.

    R  sum of the ranks    σ  singular values of ΔW, largest first

    [LoRA]  Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models
    [EY]    Eckart & Young 1936, The Approximation of One Matrix by Another of Lower Rank
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from minilora.errors import (
    ConfigError,
    ShapeError,
    TrainingError,
    answers,
    check_types,
    document_fields,
    in_recipe,
    option,
)
from minilora.lora import widest

CombinationType = Literal["cat", "svd", "linear"]
IN_RECIPE = ("ties", "dare", "magnitude_prune")  # PEFT's other types begin like this


@answers(density=in_recipe("ties_and_dare"), majority_sign_method=in_recipe("ties_and_dare"))
@document_fields
@dataclass(frozen=True)
class CombineConfig:
    """How adapters are combined. Names of fields and types are those of PEFT's `add_weighted_adapter`.

        cat     the exact sum; its rank is the sum of the ranks
        svd     the sum, cut to a rank
        linear  A = Σ ±√|w s|·Aᵢ and B = Σ √|w s|·Bᵢ; not the sum: B A also has Bᵢ Aⱼ of different adapters

    Raises:
        ConfigError: a value has the wrong type, cannot work or has no effect.
    """

    combination_type: CombinationType = option(
        "cat", "cat is the exact sum, svd the sum cut to a rank, linear adds the As and the Bs"
    )
    svd_rank: int | None = option(None, "rank to cut to, for svd (default: the largest of the adapters)")

    def __post_init__(self) -> None:
        if str(self.combination_type).startswith(IN_RECIPE):
            raise ConfigError(f"combination_type is {self.combination_type!r}; {in_recipe('ties_and_dare')}")
        check_types(type(self), vars(self))
        if self.svd_rank is not None and self.combination_type != "svd":
            raise ConfigError(f"svd_rank: without effect; {self.combination_type!r} cuts nothing, give svd")
        if self.svd_rank is not None and self.svd_rank < 1:
            raise ConfigError(f"svd_rank is {self.svd_rank!r}, need a whole number of at least 1")


class Factors(NamedTuple):
    """The factors of an adapter at one module: ΔW = scale · lora_B lora_A.

    Shapes: lora_A (r, in), lora_B (out, r)
    """

    lora_A: Tensor
    lora_B: Tensor
    scale: float = 1.0


class LowRank(NamedTuple):
    """A low-rank approximation B A of ΔW, with ‖ΔW - B A‖² lost of ‖ΔW‖²; both are 0 if nothing was cut."""

    factors: Factors
    lost: float = 0.0
    total: float = 0.0


def combine(
    adapters: Sequence[Mapping[str, Factors]], weights: Sequence[float], config: CombineConfig | None = None
) -> dict[str, LowRank]:
    """Combine adapters (path -> factors) into one, module by module; a module combines the adapters that have it.

    A weight of -1 subtracts an adapter. Results are in the adapters' dtype, float32 at least.

    Raises:
        ConfigError: there is not one finite weight for each adapter.
        TrainingError: an update to cut, or the result, is not finite.
        ShapeError: the adapters of a module differ in rank, and "linear" cannot add them.
    """
    config = config or CombineConfig()
    if not any(adapters) or len(adapters) != len(weights) or not all(map(math.isfinite, weights)):
        raise ConfigError(f"need a finite weight for each of the {len(adapters)} adapters, found {list(weights)}")
    combined = {}
    for path in dict.fromkeys(path for adapter in adapters for path in adapter):
        parts = []
        for adapter, weight in zip(adapters, weights, strict=True):
            if path in adapter:
                lora_A, lora_B, scale = adapter[path]
                dtype = widest(lora_A, lora_B)
                parts.append(Factors(lora_A.detach().to(dtype), lora_B.detach().to(dtype), weight * scale))
        if config.combination_type == "linear":
            if len(ranks := {len(part.lora_A) for part in parts}) > 1:
                raise ShapeError(
                    f"{path}: 'linear' needs adapters of one rank, found {sorted(ranks)}; cat and svd take any"
                )
            combined[path] = LowRank(_linear(parts))
        elif config.combination_type == "cat":
            combined[path] = LowRank(concatenate(parts))
        else:
            largest = max(len(part.lora_A) for part in parts)
            combined[path] = truncate(concatenate(parts), config.svd_rank or largest)
        if not combined[path].factors.lora_B.isfinite().all():
            raise TrainingError(f"{path}: with the weights {list(weights)} the result is not finite")
    return combined


def _linear(parts: Sequence[Factors]) -> Factors:
    """Add the As and the Bs, each with the root of its scale; A has the sign."""
    roots = [math.sqrt(abs(part.scale)) for part in parts]
    As = [math.copysign(root, part.scale) * part.lora_A for root, part in zip(roots, parts, strict=True)]
    Bs = [root * part.lora_B for root, part in zip(roots, parts, strict=True)]
    return Factors(torch.stack(As).sum(0), torch.stack(Bs).sum(0))


def concatenate(parts: Sequence[Factors]) -> Factors:
    """Add adapters by concatenating their ranks: Σ sᵢ·Bᵢ Aᵢ = [s₁B₁ s₂B₂ …][A₁; A₂; …], exactly.

    >>> A, B = torch.ones(1, 3), torch.ones(2, 1)
    >>> concatenate([Factors(A, B, 2.0), Factors(A, B, -6.0)]).lora_B
    tensor([[ 2., -6.],
            [ 2., -6.]])
    """
    scaled = [part.scale * part.lora_B for part in parts]
    return Factors(torch.cat([part.lora_A for part in parts]), torch.cat(scaled, dim=1))


def truncate(factors: Factors, rank: int) -> LowRank:
    """Compute `best_factors` of s·B A without forming it: B = Q R and Aᵀ = Q′ R′ make it Q (s·R R′ᵀ) Q′ᵀ.

    Q and Q′ have orthonormal columns, so the singular values are those of the small matrix between them, (R, R).
    """
    turn_out, right_B = torch.linalg.qr(factors.lora_B)
    turn_in, right_A = torch.linalg.qr(factors.lora_A.T)
    (lora_A, lora_B, _), lost, total = best_factors(factors.scale * (right_B @ right_A.T), rank)
    return LowRank(Factors(lora_A @ turn_in.T, turn_out @ lora_B), lost, total)


def best_factors(delta: Tensor, rank: int) -> LowRank:
    """Return the best approximation B A of a rank to ΔW = U diag(σ) Vᵀ: B = U √σ, A = √σ Vᵀ of the largest σ  [EY].

    Both factors get √σ, so that they are of the same size.

    Shapes: delta (out, in) -> lora_A (rank, in), lora_B (out, rank)
    """
    if not delta.isfinite().all():
        raise TrainingError(f"a change of {tuple(delta.shape)} holds numbers that are not finite, or the weights do")
    U, sigma, Vt = torch.linalg.svd(delta.to(widest(delta)), full_matrices=False)
    root = sigma[:rank].sqrt()
    squares = sigma.cpu().double().square()
    factors = Factors(root[:, None] * Vt[:rank], U[:, :rank] * root)
    return LowRank(factors, squares[rank:].sum().item(), squares.sum().item())
