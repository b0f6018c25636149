"""Exercise 11: what a merge loses, and TIES. For the verdict: python tutorials/exercises/check.py 11"""

from collections.abc import Callable

from torch import Tensor


def swallowed(W: Tensor, delta: Tensor) -> float:
    """The share of the weights that are the same after W + delta, computed in float32, is rounded to bfloat16.

    Shapes: W (out, in) bfloat16, delta (out, in)
    """
    raise NotImplementedError


def ties(one: Tensor, two: Tensor, density: float) -> Tensor:
    """Two changes in one, by TIES: keep the largest numbers of each, elect a sign at each place, take the mean.

    Of the n numbers of a change the round(density·n) of largest absolute value are kept, at least one. The sign of the
    sum of what was kept is elected. The mean is that of the kept numbers with this sign; where there is none, it is 0.

    Shapes: one (out, in), two (out, in) -> (out, in)
    """
    raise NotImplementedError


def merge_error(layers: list[tuple[Tensor, Tensor, Tensor, float]], store: Callable[[Tensor], Tensor]) -> float:
    """‖W' - (W + ΔW)‖ / ‖ΔW‖ over all layers (W, A, B, s) together, with ΔW = s·B A and W' = store(W + ΔW).

    `store` rounds a weight as it will be stored, to bfloat16 or to four bits, and returns it as it is read back. Norms
    are of all numbers of all layers. Everything else is computed in float64, and nothing that was given is changed.

    Shapes: W (out, in) bfloat16, A (r, in), B (out, r), with other sizes for each layer
    """
    raise NotImplementedError
