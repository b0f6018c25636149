"""Exercise 10: three functions on forgetting. For the verdict: python tutorials/exercises/check.py 10"""

from collections.abc import Callable

from torch import Tensor

Weights = dict[str, Tensor]


def divergence(base: Tensor, tuned: Tensor) -> float:
    """The mean over all positions of KL(base ‖ tuned) = Σ p·log(p/q), from logits, in nats. It is finite.

    Shapes: base (N, V), tuned (N, V)
    """
    raise NotImplementedError


def replayed(task: int, general: int, share: float) -> list[int]:
    """The rows to train on: all `task` rows, and as many general ones as make `share` of the whole.

    Rows are numbered: task rows from 0, general ones from `task` on. General rows are taken in order, and again from
    the first if there are too few; their number is rounded to the nearest. 0 ≤ share < 1.
    """
    raise NotImplementedError


def weaken(before: Weights, after: Weights, kl: Callable[[Weights], float], budget: float) -> Weights:
    """The weights on the straight way from before to after, as far along as their KL to the base keeps to the budget.

    `kl` measures the KL of any weights, which is more than 0 for `after`; it may be called once. Nothing that was given
    is changed.
    """
    raise NotImplementedError
