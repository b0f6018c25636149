"""What a solution of exercise 12 must do."""

from __future__ import annotations

import math
from types import ModuleType

import numpy as np
import torch

SHAPES = ((7, 11), (11, 7), (8, 8))  # (out, in)


def check(answer: ModuleType) -> None:
    """`amplification` equals that by the eigenvectors of ΔWᵀ ΔW, without a singular value decomposition."""
    generator = torch.Generator().manual_seed(0)
    for out, width in SHAPES:
        W, A, B = (
            torch.randn(shape, generator=generator, dtype=torch.float64)
            for shape in ((out, width), (4, width), (out, 4))
        )
        for k, s in ((4, 2.0), (2, 0.5), (1, 7.0)):
            case = f"W {(out, width)}, rank 4, s = {s}, k = {k}"
            found = answer.amplification(W, A, B, s, k)
            assert isinstance(found, float), f"{case}: found {type(found).__name__}, need a float (`.item()`)"
            expected, wrong = ratios(W.numpy(), A.numpy(), B.numpy(), s, k)
            why = next((why for why, value in wrong.items() if math.isclose(found, value, rel_tol=1e-6)), "")
            assert math.isclose(found, expected, rel_tol=1e-9), f"{case}: found {found:.5f}, need {expected:.5f}{why}"


def ratios(W: np.ndarray, A: np.ndarray, B: np.ndarray, s: float, k: int) -> tuple[float, dict[str, float]]:
    """The amplification, and what answers give that are easily made, by what is wrong with them."""
    delta = s * B @ A
    squares, V = np.linalg.eigh(delta.T @ delta)
    V = V[:, ::-1][:, :k]  # of the largest eigenvalues
    U = delta @ V / np.linalg.norm(delta @ V, axis=0)
    size, inside = math.sqrt(squares[::-1][:k].sum()), float(np.linalg.norm(U.T @ W @ V))
    own = float(np.linalg.norm(np.linalg.svd(W, compute_uv=False)[:k]))
    return size / inside, {
        ". The scale s is missing": size / s / inside,
        ". That is the whole of ΔW over a part of W: cut ΔW to the same k directions": float(np.linalg.norm(delta))
        / inside,
        ". Those are the directions of W; need those of ΔW": size / own,
        ". That is a ratio of squares; a norm is their root": (size / inside) ** 2,
        ". That is the inverse: by how much does ΔW exceed what W does?": inside / size,
        ". That divides by all of W, not by what lies in the directions of ΔW": size / float(np.linalg.norm(W)),
    }
