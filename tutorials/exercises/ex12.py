"""Exercise 12: DoRA's weight, the gradient of m, and another start. Verdict: python tutorials/exercises/check.py 12"""

from torch import Tensor


def dora_weight(W: Tensor, A: Tensor, B: Tensor, s: float, m: Tensor) -> Tensor:
    """The weight of a merged DoRA layer: the rows of W + s·B A, each with the length that m gives it. m is positive.

    Shapes: W (out, in), A (r, in), B (out, r), m (out) -> (out, in)
    """
    raise NotImplementedError


def magnitude_gradient(x: Tensor, dy: Tensor, W: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    """The gradient of DoRA's m, where y = m ⊙ x (W + s·B A)ᵀ / ‖W + s·B A‖ + b and dy is the gradient of y.

    Shapes: x (N, in), dy (N, out), W (out, in), A (r, in), B (out, r) -> (out)
    """
    raise NotImplementedError


def smallest_start(W: Tensor, r: int, s: float) -> tuple[Tensor, Tensor, Tensor]:
    """A, B and what stays frozen, so that s·B A is the part of W with its r smallest singular values.

    Row i of A is as long as column i of B.

    Shapes: W (out, in) -> (r, in), (out, r), (out, in)
    """
    raise NotImplementedError
