"""The size of an adapter's change: singular values of B A, effective rank, Frobenius norms.

    effective rank = exp(-Σ pᵢ log pᵢ),  pᵢ = σᵢ² / Σ σ²

It is 1 if ΔW lies in one direction, and r if all r directions are equally strong.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

CHUNK = 2**22  # numbers that are widened to float64 at a time


def delta_spectrum(lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """Compute the singular values of B A without B A: those of R_B R_Aᵀ, where B = Q_B R_B and Aᵀ = Q_A R_A.

    Q_B and Q_A have orthonormal columns, which change no singular value. The shorter way to the norm,
    tr((BᵀB)(AAᵀ)), loses half of the digits where B and A nearly cancel.

    Shapes: lora_A (..., r, in), lora_B (..., out, r) -> (..., k) with k = min(r, in, out), the largest first;
    nan where a number or a product is not finite.
    """
    R_A, R_B = (torch.linalg.qr(factor, mode="r").R for factor in (lora_A.mT, lora_B))
    core = R_B @ R_A.mT
    # svdvals raises an error if a number is not finite.
    return torch.linalg.svdvals(core) if core.isfinite().all() else torch.full((1,), math.nan)


def effective_rank(singular_values: Tensor) -> float:
    """Count the equally strong directions whose energy has the same entropy; 0 for zero.

    >>> effective_rank(torch.tensor([3.0, 3.0, 0.0]))
    2.0
    """
    if not singular_values.numel() or singular_values.max() == 0:
        return 0.0
    energy = (singular_values / singular_values.max()).square()  # whose squares neither overflow nor vanish
    return torch.special.entr(energy / energy.sum()).sum().exp().item()


def frobenius_norm(weight: Tensor, other: Tensor | None = None) -> float:
    """Compute ‖W‖_F, or ‖W - other‖_F, summed in float64, a few rows at a time.

    Shapes: weight (out, in), other (out, in) -> a number
    """
    rows = max(1, CHUNK // max(1, weight.shape[-1]))
    parts = (part.double() for part in weight.split(rows))
    if other is not None:
        parts = (part - old.double() for part, old in zip(parts, other.split(rows), strict=True))
    return math.sqrt(sum(part.square().sum().item() for part in parts))


def relative_change(new: Tensor, old: Tensor) -> float | None:
    """Compute ‖new - old‖ / ‖old‖; None if the sizes differ, a number is not finite, or `old` is zero."""
    old = torch.atleast_1d(old)
    if new.numel() != old.numel() or not (size := frobenius_norm(old)):
        return None
    ratio = frobenius_norm(new.reshape(old.shape), old) / size
    return ratio if math.isfinite(ratio) else None
