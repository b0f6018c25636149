"""What a solution of exercise 5 must do."""

from __future__ import annotations

import math
from types import ModuleType

import numpy as np
import torch

from minilora.testing.reference import lora_merged_weight

CASES = [((6, 9), 1, 0.5), ((6, 9), 3, 2.0), ((9, 4), 2, 7.0), ((9, 4), 4, 0.25)]  # (out, in), r, s


def check(answer: ModuleType) -> None:
    """`best_adapter` reaches the loss that the eigenvalues of ΔWᵀ ΔW allow, and says which that is."""
    generator = torch.Generator().manual_seed(0)
    for shape, r, s in CASES:
        delta = torch.randn(shape, generator=generator, dtype=torch.float64)
        given = delta.clone()
        case = f"ΔW {shape}, rank {r}, scale {s}"
        A, B, told = answer.best_adapter(delta, r, s)
        for name, factor, need in (("A", A, (r, shape[1])), ("B", B, (shape[0], r))):
            assert factor.shape == need, f"{case}: {name} is {tuple(factor.shape)}, need {need}"
        kind = type(told).__name__
        assert isinstance(told, float), f"{case}: the loss is a {kind}, need a Python float (`.item()`)"
        squares = np.linalg.eigvalsh(delta.numpy().T @ delta.numpy())[::-1]  # of the singular values
        least, total = max(0.0, math.fsum(squares[r:])), math.fsum(squares)
        left = delta.numpy() - lora_merged_weight(np.zeros(shape), A.numpy(), B.numpy(), s)
        loss = float(np.square(left).sum())
        hint = "keep the r largest singular values, each once, with the u and v that belong to them"
        others = [np.square(delta.numpy() - factor * (B @ A).numpy()).sum() for factor in (1, s * s)]
        if min(others) < least + 1e-9 * total:
            hint = "these are the right singular values, but is s divided out once? The layer multiplies B A by it"
        assert loss < least + 1e-9 * total, (
            f"{case}: s·B A misses {loss:.4f} of {total:.4f}, and the best misses {least:.4f}. {hint}"
        )
        assert abs(told - least) < 1e-9 * total, (
            f"{case}: the loss is said to be {told:.4f} and is {least:.4f}: "
            "the sum of the squares of the singular values of ΔW that are dropped"
        )
        assert torch.equal(delta, given), f"{case}: best_adapter changes the ΔW that it was given"
