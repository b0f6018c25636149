"""What a solution of exercise 9 must do."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType

CURVES: dict[str, Callable[[float], float]] = {
    "0.4 c²": lambda c: 0.4 * c * c,
    "3 c⁴": lambda c: 3 * c**4,
    "0.15 c": lambda c: 0.15 * c,
    "0.1 c": lambda c: 0.1 * c,  # c = 1 spends the budget exactly
    "0.05 c": lambda c: 0.05 * c,
}
BUDGET = 0.1


def check(answer: ModuleType) -> None:
    """`largest_factor` returns a factor within the budget, beyond which there is none by more than the tolerance."""
    for name, curve in CURVES.items():
        for tolerance in (0.01, 0.0003):
            case = f"kl(c) = {name}, budget {BUDGET}, tolerance {tolerance}"
            c = answer.largest_factor(Counted(curve, tolerance, case), BUDGET, tolerance)
            assert isinstance(c, float), f"{case}: found {type(c).__name__}, need a float"
            assert 0 <= c <= 1, f"{case}: found {c}, which is not between 0 and 1"
            found = f"{case}: found {c:.5f}"
            assert curve(c) <= BUDGET, f"{found}, where kl is {curve(c):.5f}: return the end that keeps to the budget"
            if curve(1.0) <= BUDGET:
                assert c == 1, f"{found}, but c = 1 keeps to the budget; bisection never looks at its own ends"
            else:
                assert curve(c + tolerance) > BUDGET, f"{found}, but {c + tolerance:.5f} keeps to the budget, too"


class Counted:
    """A KL that may be asked for a few times only, and only for factors between 0 and 1."""

    def __init__(self, curve: Callable[[float], float], tolerance: float, case: str):
        self.curve, self.case, self.calls = curve, case, 0
        self.most = math.ceil(math.log2(1 / tolerance)) + 2

    def __call__(self, c: float) -> float:
        self.calls += 1
        assert 0 <= c <= 1, f"{self.case}: kl is asked for c = {c}; the factor lies between 0 and 1"
        assert self.calls <= self.most, f"{self.case}: kl is called more than {self.most} times; halve the interval"
        return self.curve(c)
