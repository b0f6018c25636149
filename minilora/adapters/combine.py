"""Combine several adapters into one, and approximate a change of a weight by an adapter: tensors only.

    ΔW = Σᵢ wᵢ·sᵢ·Bᵢ Aᵢ,    A (r, in),  B (out, r),  sᵢ the scale of adapter i,  wᵢ the weight that the user gives it

The result has scale 1 (alpha = r without rsLoRA), whatever the scales of the adapters.

    R  sum of the ranks    σ  singular values of ΔW, largest first

    [LoRA]  Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models
    [EY]    Eckart & Young 1936, The Approximation of One Matrix by Another of Lower Rank
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from minilora.adapters.config import HEADS, LoraConfig, Task
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

WEIGHT = 1e6  # the largest of an adapter in a sum

CombinationType = Literal["cat", "svd", "linear"]
IN_RECIPE = ("ties", "dare", "magnitude_prune")  # PEFT's other types begin like this
NOT_ADDED = {  # fields of a LoraConfig, and why adapters that have them cannot be added
    "use_dora": "m/‖W + ΔW‖ multiplies the whole weight, so it is no sum of updates",
    "modules_to_save": "a module trained in full stands in place of the base's",
    "task_type": "the head of a classifier is trained in full, and only one can stand there",
    "bias": "a trained bias stands in place of the base's",
    "lora_bias": "a bias is no update of low rank",
    "trainable_token_indices": "trained rows stand in place of the base's",
}


@answers(density=in_recipe("ties_and_dare"), majority_sign_method=in_recipe("ties_and_dare"))
@document_fields
@dataclass(frozen=True)
class CombineConfig:
    """How adapters are combined. Names of fields and types are those of PEFT's `add_weighted_adapter`.

        cat     the exact sum; its rank is the sum of the ranks
        svd     the sum, cut to a rank or to a share of its energy
        linear  A = Σ ±√|w s|·Aᵢ and B = Σ √|w s|·Bᵢ; not the sum: B A also has Bᵢ Aⱼ of different adapters

    Raises:
        ConfigError: a value has the wrong type, cannot work or has no effect; all of them in one message.
    """

    combination_type: CombinationType = option(
        "cat", "cat is the exact sum, svd the sum cut to a rank, linear adds the As and the Bs"
    )
    svd_rank: int | None = option(None, "rank to cut to, for svd (default: the largest of the adapters)")
    svd_energy: float | None = option(
        None, "or: cut each module to the smallest rank that keeps this share of the squared singular values"
    )

    def __post_init__(self) -> None:
        if str(self.combination_type).startswith(IN_RECIPE):
            raise ConfigError(f"combination_type is {self.combination_type!r}; {in_recipe('ties_and_dare')}")
        check_types(type(self), vars(self))
        bad = []
        for name in ("svd_rank", "svd_energy"):
            if getattr(self, name) is not None and self.combination_type != "svd":
                bad.append(f"{name}: without effect; {self.combination_type!r} cuts nothing, give svd")
        if self.svd_rank is not None and self.svd_rank < 1:
            bad.append(f"svd_rank is {self.svd_rank!r}, need a whole number of at least 1")
        if self.svd_energy is not None and not 0 < self.svd_energy <= 1:
            bad.append(f"svd_energy is {self.svd_energy!r}, need a number above 0, at most 1")
        if bad:
            raise ConfigError("CombineConfig: " + "; ".join(bad))


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
        ConfigError: there is not one finite weight for each adapter, or the result is not finite.
        TrainingError: an update to cut is not finite.
        ShapeError: the adapters of a module do not fit together.
    """
    config = config or CombineConfig()
    if not any(adapters) or len(adapters) != len(weights) or not all(abs(w) <= WEIGHT for w in weights):
        need = f"need a finite weight, at most {WEIGHT:,.0f}, for each of the {len(adapters)} adapters"
        raise ConfigError(f"{need}, found {list(weights)}")
    combined = {}
    for path in dict.fromkeys(path for adapter in adapters for path in adapter):
        pairs = [(adapter[path], w) for adapter, w in zip(adapters, weights, strict=True) if path in adapter]
        parts, its_weights = zip(*pairs, strict=True)
        cut = combined[path] = _combine(_checked(path, parts, config), its_weights, config)
        if not all(bool(factor.isfinite().all()) for factor in cut.factors[:2]):
            raise ConfigError(f"{path}: the result overflows {cut.factors.lora_A.dtype} with the weights {its_weights}")
    return combined


def _combine(parts: Sequence[Factors], weights: Sequence[float], config: CombineConfig) -> LowRank:
    """Combine the adapters of one module."""
    if config.combination_type == "linear":
        shares = [weight * part.scale for part, weight in zip(parts, weights, strict=True)]
        roots = [math.sqrt(abs(share)) for share in shares]
        signed = map(math.copysign, roots, shares)
        lora_A = torch.stack([root * part.lora_A for root, part in zip(signed, parts, strict=True)]).sum(0)
        lora_B = torch.stack([root * part.lora_B for root, part in zip(roots, parts, strict=True)]).sum(0)
        return LowRank(Factors(lora_A, lora_B))
    found = concatenate(parts, weights)
    if config.combination_type == "cat":
        return LowRank(found)
    largest = None if config.svd_energy else max(part.lora_A.size(0) for part in parts)
    return truncate(found, config.svd_rank or largest, config.svd_energy)


def concatenate(parts: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """Add adapters by concatenating their ranks: Σ wᵢ·sᵢ·Bᵢ Aᵢ = [w₁s₁B₁ w₂s₂B₂ …][A₁; A₂; …], exactly.

    >>> one = Factors(torch.ones(1, 3), torch.ones(2, 1), scale=2.0)
    >>> concatenate([one, one], [1, -3]).lora_B
    tensor([[ 2., -6.],
            [ 2., -6.]])
    """
    scaled = [weight * part.scale * part.lora_B for part, weight in zip(parts, weights, strict=True)]
    return Factors(torch.cat([part.lora_A for part in parts]), torch.cat(scaled, dim=1))


def truncate(factors: Factors, rank: int | None = None, energy: float | None = None) -> LowRank:
    """Compute `best_factors` of s·B A without forming it: B = Q R and Aᵀ = Q′ R′ make it Q (s·R R′ᵀ) Q′ᵀ.

    Q and Q′ have orthonormal columns, so the singular values are those of the small matrix between them, (R, R).
    """
    turn_out, right_B = torch.linalg.qr(factors.lora_B)
    turn_in, right_A = torch.linalg.qr(factors.lora_A.T)
    (lora_A, lora_B, _), lost, total = best_factors(factors.scale * (right_B @ right_A.T), rank, energy)
    return LowRank(Factors(lora_A @ turn_in.T, turn_out @ lora_B), lost, total)


def best_factors(delta: Tensor, rank: int | None = None, energy: float | None = None) -> LowRank:
    """Return the best approximation B A of a rank to ΔW = U diag(σ) Vᵀ: B = U √σ, A = √σ Vᵀ of the largest σ  [EY].

    The rank is at most `rank`, and the least that keeps the share `energy` of Σσ² = ‖ΔW‖²; it is 1 at least.
    Both factors get √σ, so that they are of the same size.

    Shapes: delta (out, in) -> lora_A (rank, in), lora_B (out, rank)
    """
    if not delta.isfinite().all():
        raise TrainingError(f"a change of {tuple(delta.shape)} holds numbers that are not finite, or the weights do")
    U, sigma, Vt = torch.linalg.svd(delta.to(_wide(delta)), full_matrices=False)
    squares = sigma.cpu().double().square()
    kept = squares.cumsum(0)
    rank = min(rank or len(sigma), len(sigma))
    if energy is not None:
        rank = min(rank, int((kept < energy * kept[-1]).sum()) + 1)
    root = sigma[:rank].sqrt()
    factors = Factors(root[:, None] * Vt[:rank], U[:, :rank] * root)
    return LowRank(factors, squares[rank:].sum().item(), kept[-1].item())


def check_additive(name: str, config: LoraConfig) -> None:
    """Raise a ConfigError unless an adapter consists of updates ΔW = s·B A alone; it names what else there is."""
    none = (False, (), None, "none", *(task for task in get_args(Task) if task not in HEADS))
    bad = [f"{field}: {why}" for field, why in NOT_ADDED.items() if getattr(config, field) not in none]
    if bad:
        raise ConfigError(f"{name}: cannot be combined with other adapters, or weighed:\n  " + "\n  ".join(bad))


def _checked(path: str, parts: Sequence[Factors], config: CombineConfig) -> list[Factors]:
    """Check the shapes of a module's adapters, and return them in their widest dtype, float32 at least."""
    shapes = {(A.shape[1:], B.shape[:1]) for A, B, _ in parts}
    found = ", ".join(f"A {tuple(A.shape)} and B {tuple(B.shape)}" for A, B, _ in parts)
    if len(shapes) > 1 or any(A.size(0) != B.size(1) for A, B, _ in parts):
        raise ShapeError(f"{path}: the adapters do not fit together: {found}")
    if config.combination_type == "linear" and len({A.size(0) for A, _, _ in parts}) > 1:
        raise ShapeError(f"{path}: 'linear' needs adapters of one rank, found {found}; cat and svd take any")
    wide = _wide(*(factor for part in parts for factor in part[:2]))
    return [Factors(A.detach().to(wide), B.detach().to(wide), s) for A, B, s in parts]


def _wide(*tensors: Tensor) -> torch.dtype:
    return functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)
