"""What a solution of exercise 10 must do."""

from __future__ import annotations

import math
from types import ModuleType

import torch
from torch import Tensor

BUDGETS = (0.1, 0.4, 3.0)  # the last is more than all of the change costs
CURVATURE = 1.6


def check_weaken(answer: ModuleType) -> None:
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
    """A question about what was probably done instead, if that is known."""
    wrong = {
        ". Twice the way, how many times the KL?": budget / CURVATURE,
        ". What lies beyond the weights after training?": math.sqrt(budget / CURVATURE),
        ". From which end do you start?": 1 - expected,
    }
    return next((why for why, value in wrong.items() if math.isclose(c, value, rel_tol=1e-4, abs_tol=1e-4)), "")


def check_divergence(answer: ModuleType) -> None:
    """The mean is that of loops over positions and tokens, also where a probability is too small for a float."""
    generator = torch.Generator().manual_seed(3)
    base, tuned = (torch.randn(4, 6, generator=generator, dtype=torch.float64) * 3 for _ in range(2))
    for name, p, q in (
        ("two models", base, tuned),
        ("the same model", base, base),
        ("logits of 2000", base, tuned * 200),
    ):
        need = sum(loop(*row) for row in zip(p.tolist(), q.tolist(), strict=True)) / len(p)
        found = answer.divergence(p, q)
        assert isinstance(found, float), f"{name}: the KL is a {type(found).__name__}, need a Python float"
        assert math.isfinite(found), f"{name}: the KL is {found}. What is the logarithm of a number that became 0?"
        assert math.isclose(found, need, rel_tol=1e-6, abs_tol=1e-9), (
            f"{name}: you say {found:.4f}, loops say {need:.4f}"
        )


def loop(base: list[float], tuned: list[float]) -> float:
    """The KL at one position."""
    of_base, of_tuned = (max(row) + math.log(sum(math.exp(x - max(row)) for x in row)) for row in (base, tuned))
    return sum(math.exp(p - of_base) * (p - of_base - q + of_tuned) for p, q in zip(base, tuned, strict=True))


def check_replayed(answer: ModuleType) -> None:
    """The share is that of the whole, and rows repeat in their order."""
    for task, general, share in ((90, 50, 0.1), (8, 3, 0.5), (5, 10, 0.0), (30, 7, 0.25)):
        rows = answer.replayed(task, general, share)
        case = f"{task} task rows and {general} general ones, share {share}"
        number = len(rows) - task
        assert sorted(rows)[:task] == [*range(task)], f"{case}: each task row must be there once"
        assert abs(number - share * len(rows)) <= 0.5, f"{case}: {number} of {len(rows)} are general. Share of what?"
        others = [row for row in rows if row >= task]
        assert others == [task + i % general for i in range(number)], f"{case}: the general rows are {others}"
