"""Exercise 9: the largest scale within a budget. For the verdict: python tutorials/exercises/check.py 09"""

from collections.abc import Callable


def largest_factor(kl: Callable[[float], float], budget: float, tolerance: float) -> float:
    """The largest factor c in [0, 1] of an adapter's scale with kl(c) <= budget, to within a tolerance, by bisection.

    kl(0) is 0, and kl grows with c. What is returned keeps to the budget. If all of [0, 1] does, it is 1. Each call of
    kl costs a pass over the text, so it is called at most log2(1 / tolerance) + 2 times.
    """
    raise NotImplementedError
