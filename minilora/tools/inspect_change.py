"""How large a change is: singular values of s·B A, norms, and the weights of a base that they are measured against."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from minilora.adapters.functional import dora_norm, lora_delta
from minilora.adapters.stored import DTYPES
from minilora.models.bitsandbytes import packed_weights, read_packed
from minilora.quant.nf4 import unpack
from minilora.storage import TensorFile

CHUNK = 2**22  # numbers that are widened to float64 at a time


def delta_spectrum(lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """Singular values of B A, without B A: those of R_B R_Aᵀ, where B = Q_B R_B and Aᵀ = Q_A R_A.

    Q_B and Q_A have orthonormal columns, which change no singular value. The shorter way to the norm,
    tr((BᵀB)(AAᵀ)), loses half of the digits where B and A nearly cancel.

    Shapes: lora_A (..., r, in), lora_B (..., out, r) -> (..., k) with k = min(r, in, out), the largest first;
    nan where a number or a product is not finite.
    """
    R_A, R_B = (torch.linalg.qr(factor, mode="r").R for factor in (lora_A.mT, lora_B))
    core = R_B @ R_A.mT
    # The singular values of what is not finite are an error.
    return torch.linalg.svdvals(core) if core.isfinite().all() else torch.full((1,), math.nan)


def effective_rank(singular_values: Tensor) -> float:
    """exp(-Σ pᵢ log pᵢ),  pᵢ = σᵢ² / Σ σ²; 0 for zero.

    >>> effective_rank(torch.tensor([3.0, 3.0, 0.0]))
    2.0
    """
    if not singular_values.numel() or singular_values.max() == 0:
        return 0.0
    energy = (singular_values / singular_values.max()).square()  # whose squares neither overflow nor vanish
    return torch.special.entr(energy / energy.sum()).sum().exp().item()


def frobenius_norm(weight: Tensor) -> float:
    """‖W‖_F, summed in float64, a few rows at a time.

    Shapes: weight (out, in) -> a number
    """
    rows = max(1, CHUNK // max(1, weight.shape[-1]))
    return math.sqrt(sum(part.double().square().sum().item() for part in weight.split(rows)))


def stretched_change(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float, magnitude: Tensor) -> Tensor:
    """What DoRA makes of W, less W: m ⊙ (W + s·B A) / ‖W + s·B A‖ - W, in float32 at least.

    Shapes: weight (out, in), lora_A (r, in), lora_B (out, r), magnitude with out numbers -> (out, in)
    """
    k = magnitude.flatten() / dora_norm(weight, lora_A, lora_B, scale)
    wide = torch.promote_types(k.dtype, weight.dtype)
    return k[:, None] * (weight.to(wide) + lora_delta(lora_A.to(wide), lora_B.to(wide), scale)) - weight.to(wide)


def distance(new: Tensor, old: Tensor) -> float | None:
    """‖new - old‖ / ‖old‖; None where the sizes differ, a number is not finite, or all of the old are zero."""
    old = torch.atleast_1d(old)
    if new.numel() != old.numel() or not (size := frobenius_norm(old)):
        return None
    rows = max(1, CHUNK // max(1, old.shape[-1]))
    pairs = zip(new.reshape(old.shape).split(rows), old.split(rows), strict=True)
    ratio = math.sqrt(sum((a.double() - b.double()).square().sum().item() for a, b in pairs)) / size
    return ratio if math.isfinite(ratio) else None


def base_tensor(weights: Mapping[str, TensorFile], name: str) -> Tensor | None:
    """A tensor of the base, of a packed one the numbers with which it acts, of a tied head the embedding's.

    None where there is none of that name, or its numbers are of a dtype that has no norm.
    """
    names = [name, *(["model.embed_tokens.weight"] if name == "lm_head.weight" else [])]
    found = next((each for each in names if each in weights), None)
    if found is None:
        return None
    if packed := packed_weights(part for part in weights if part.startswith(found)):
        parts, layout = read_packed(weights, packed[found], torch.device("cpu"))
        return unpack(parts, layout, torch.float32)
    tensor = weights[found].read(found)
    return tensor if tensor.dtype in DTYPES else None
