"""Exercise 5: the best adapter of a rank, and its loss. For the verdict: python tutorials/exercises/check.py 05"""

from torch import Tensor


def best_adapter(delta: Tensor, r: int, s: float) -> tuple[Tensor, Tensor, float]:
    """The A and B of rank r for which s·B A is nearest to ΔW, and the loss ‖ΔW - s·B A‖² that must remain.

    ‖·‖² is the sum of the squares of all numbers. The loss is told from the singular values alone.

    Shapes: delta (out, in) -> A (r, in), B (out, r)
    """
    raise NotImplementedError
