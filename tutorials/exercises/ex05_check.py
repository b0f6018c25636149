"""What a solution of exercise 5 must do."""

from __future__ import annotations

import math
from types import ModuleType

import torch
from torch import Tensor, nn


def check_first_gradient(answer: ModuleType) -> None:
    """The forecast is the root mean square over many draws of A."""
    generator = torch.Generator().manual_seed(0)
    for out, width, r, alpha in ((6, 12, 4, 8.0), (9, 30, 3, 6.0), (5, 20, 1, 0.5)):
        G = torch.randn(out, width, generator=generator, dtype=torch.float64)
        A = torch.empty(20_000, r, width, dtype=torch.float64).uniform_(-1, 1, generator=generator) / width**0.5
        measured = (alpha / r * (G @ A.mT)).square().sum(dim=(1, 2)).mean().sqrt().item()
        found = answer.first_gradient(G.norm().item(), width, r, alpha)
        assert math.isclose(found, measured, rel_tol=0.02), (
            f"‖G‖ = {G.norm():.3f}, width {width}, rank {r}, α = {alpha:g}: over 20,000 starts it is "
            f"{measured:.4f}, and you say {found:.4f}. How large is one column of the gradient? How many are there?"
        )


def check_signal_and_noise(answer: ModuleType) -> None:
    """What is found gives back both mean squares."""
    for squares in ({1: 20.0, 5: 12.0}, {64: 3.5, 2: 9.0}, {8: 4.0, 32: 4.0}):
        signal, noise = answer.signal_and_noise(dict(squares))
        for rows, square in squares.items():
            assert math.isclose(signal + noise / rows, square, rel_tol=1e-9), (
                f"of {squares} you find signal {signal:g}, noise {noise:g}, with which {rows} rows "
                f"have {signal + noise / rows:g} and not {square:g}. Write the law down once for each size"
            )


def check_same_training(answer: ModuleType) -> None:
    """ΔW is the same after each of ten steps of Adam."""
    for s, rate, new_s in ((2.0, 0.01, 32.0), (8.0, 0.004, 0.5), (1.5, 0.02, 3.0)):
        rate_A, rate_B = answer.same_training(s, rate, new_s)
        pairs = zip(steps(s, rate, rate), steps(new_s, rate_A, rate_B), strict=True)
        for number, (old, new) in enumerate(pairs, start=1):
            assert torch.allclose(old, new, rtol=1e-4, atol=1e-6), (
                f"from s = {s:g} to {new_s:g} at rate {rate:g}, ΔW is another after step {number}: norm "
                f"{new.norm():.4f} instead of {old.norm():.4f}. In ΔW = s·BA, what must become of A and of B?"
            )


def steps(s: float, rate_A: float, rate_B: float) -> list[Tensor]:
    """ΔW after each of ten steps of Adam."""
    generator = torch.Generator().manual_seed(0)
    x, wanted, start = (
        torch.randn(size, generator=generator, dtype=torch.float64) for size in ((20, 7), (20, 5), (3, 7))
    )
    A, B = nn.Parameter(start), nn.Parameter(torch.zeros(5, 3, dtype=torch.float64))
    adam = torch.optim.Adam([{"params": [A], "lr": rate_A}, {"params": [B], "lr": rate_B}])
    found = []
    for _ in range(10):
        adam.zero_grad()
        (s * x @ A.T @ B.T - wanted).square().mean().backward()
        adam.step()
        found.append((s * B @ A).detach())
    return found
