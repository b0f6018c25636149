"""What a solution of exercise 10 must do."""

from __future__ import annotations

import math
from types import ModuleType

import torch
from torch import Tensor

BUDGETS = (0.1, 0.4, 3.0)  # the last is more than all of the change costs
CURVATURE = 1.6


def check(answer: ModuleType) -> None:
    """`weaken` returns weights on the straight line, as far as the budget goes, after one measurement."""
    generator = torch.Generator().manual_seed(0)
    before, after = (
        {name: torch.randn(shape, generator=generator) for name, shape in (("a", (3, 4)), ("b", (5,)))}
        for _ in range(2)
    )
    whole = distance(before, after)
    kept = [tensor.clone() for tensor in (*before.values(), *after.values())]
    for budget in BUDGETS:
        asked = []

        def kl(weights: dict[str, Tensor], asked: list[float] = asked) -> float:
            asked.append(distance(before, weights))
            return CURVATURE * (asked[-1] / whole) ** 2

        found = answer.weaken(before, after, kl, budget)
        case = f"KL = {CURVATURE}·c², budget {budget}"
        same = all(map(torch.equal, kept, (*before.values(), *after.values())))
        assert same, f"{case}: weaken changes weights that it was given"
        assert len(asked) <= 1, f"{case}: kl is called {len(asked)} times; one measurement tells the whole parabola"
        assert found.keys() == before.keys(), f"{case}: the weights are {sorted(found)}, need {sorted(before)}"
        expected = min(1.0, math.sqrt(budget / CURVATURE))
        c = distance(before, found) / whole
        right = all(torch.allclose(found[name], torch.lerp(before[name], after[name], expected)) for name in before)
        assert right, f"{case}: found c = {c:.4f}, need {expected:.4f}{reason(c, expected, budget)}"


def distance(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    return math.sqrt(sum((two[name] - one[name]).square().sum().item() for name in one))


def reason(c: float, expected: float, budget: float) -> str:
    """What was probably done instead, if that is known."""
    wrong = {
        ". The root is missing: KL grows like c², so c is the root of a ratio": budget / CURVATURE,
        ". That goes beyond the weights after training; c is at most 1": math.sqrt(budget / CURVATURE),
        ". That is the way from after to before": 1 - expected,
    }
    return next((why for why, value in wrong.items() if math.isclose(c, value, rel_tol=1e-4, abs_tol=1e-4)), "")
