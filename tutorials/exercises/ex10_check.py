"""What a solution of exercise 10 must do."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType

CURVES: dict[str, Callable[[float], float]] = {
    "0.4 c²": lambda c: 0.4 * c * c,
    "3 c⁴": lambda c: 3 * c**4,
    "0.05 c": lambda c: 0.05 * c,
}
BUDGET = 0.1


def check(answer: ModuleType) -> None:
    """`largest_factor` returns a factor within the budget, beyond which there is none by more than the tolerance."""
    for name, curve in CURVES.items():
        for tolerance in (0.01, 0.0003):
            calls: list[float] = []

            def kl(c: float, curve: Callable[[float], float] = curve, calls: list[float] = calls) -> float:
                calls.append(c)
                at_most = math.ceil(math.log2(1 / tolerance)) + 2
                assert 0 <= c <= 1, f"kl is asked for c = {c}; the factor lies between 0 and 1"
                assert len(calls) <= at_most, f"{case}: kl is called more than {at_most} times; halve the interval"
                return curve(c)

            case = f"kl(c) = {name}, budget {BUDGET}, tolerance {tolerance}"
            c = answer.largest_factor(kl, BUDGET, tolerance)
            assert isinstance(c, float), f"{case}: found {type(c).__name__}, need a float"
            assert 0 <= c <= 1, f"{case}: found {c}, which is not between 0 and 1"
            assert curve(c) <= BUDGET, f"{case}: found {c:.5f}, where kl is {curve(c):.5f}: return the end that keeps to it"
            if curve(1.0) <= BUDGET:
                assert c == 1, f"{case}: found {c:.5f}, but c = 1 keeps to the budget; bisection never looks at its ends"
            else:
                beyond = curve(c + tolerance)
                assert beyond > BUDGET, f"{case}: found {c:.5f}, but {c + tolerance:.5f} keeps to the budget, too"
