"""What a solution of exercise 13 must do."""

from __future__ import annotations

import math
from types import ModuleType

import numpy as np
import torch

SHAPES = ((7, 11), (11, 7), (8, 8))  # (out, in)


def check_chance(answer: ModuleType) -> None:
    """The share is that of 2,000 pairs drawn with numpy, and in a room that of two lines, 1 - √φ."""
    generator = np.random.default_rng(0)
    for phi, i, j, n in ((0.25, 1, 1, 3), (0.1, 1, 1, 12), (0.4, 3, 5, 12), (0.5, 5, 3, 12), (0.9, 4, 12, 12)):
        found, case = answer.chance(phi, i, j, n), f"φ = {phi}, i = {i}, j = {j}, n = {n}"
        bases = [[np.linalg.qr(generator.normal(size=(n, k)))[0] for k in (i, j)] for _ in range(2000)]
        seen = float(np.mean([np.square(one.T @ two).sum() / min(i, j) >= phi for one, two in bases]))
        assert n > 3 or math.isclose(seen, 1 - phi**0.5, abs_tol=0.03)
        assert math.isclose(found, seen, abs_tol=0.05), (
            f"{case}: you say {found:.3f}, of 2,000 random pairs {seen:.3f} share so much"
        )


def check_shared(answer: ModuleType) -> None:
    """φ equals that by eigenvectors of ΔWᵀ ΔW; an adapter shares all of itself, whatever its outputs are."""
    generator = torch.Generator().manual_seed(0)
    A, B, C, D = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((4, 9), (7, 4), (3, 9), (7, 3))
    )
    for k in (1, 3):
        for name, one, two in (("an adapter and itself", (A, B), (A, B)), ("two adapters", (A, B), (C, D))):
            found, case = answer.shared(one, two, k), f"{name}, k = {k}"
            assert isinstance(found, float), f"{case}: found {type(found).__name__}, need a float"
            V, other = (np.linalg.eigh(m.T @ m)[1][:, ::-1][:, :k] for m in ((b @ a).numpy() for a, b in (one, two)))
            need = float(np.square(V.T @ other).sum()) / k
            U, answers = (np.linalg.eigh(m @ m.T)[1][:, ::-1][:, :k] for m in ((b @ a).numpy() for a, b in (one, two)))
            wrong = {
                ". Do you compare what they listen to, or what they answer?": float(np.square(U.T @ answers).sum()) / k,
                ". How large can it be at most?": need * k,
                ". Is it cosines that you add, or something made of them?": float(np.abs(V.T @ other).sum()) / k,
            }
            why = next((why for why, value in wrong.items() if math.isclose(found, value, rel_tol=1e-6)), "")
            assert math.isclose(found, need, rel_tol=1e-9), f"{case}: found {found:.5f}, need {need:.5f}{why}"


def check_amplification(answer: ModuleType) -> None:
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
            assert isinstance(found, float), f"{case}: found {type(found).__name__}, need a float"
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
        ". Is there an s in it?": size / s / inside,
        ". How many directions of the change do you count?": float(np.linalg.norm(delta)) / inside,
        ". Whose directions are those?": size / own,
        ". Is that a ratio of norms?": (size / inside) ** 2,
        ". Which of the two is expected to be larger?": inside / size,
        ". How much of W do you count?": size / float(np.linalg.norm(W)),
    }
