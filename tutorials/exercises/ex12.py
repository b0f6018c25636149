"""Exercise 12: the gradient of m. For the verdict: python tutorials/exercises/check.py 12"""

from torch import Tensor


def magnitude_gradient(x: Tensor, dy: Tensor, W: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    """The gradient of DoRA's m, where y = m ⊙ x (W + s·B A)ᵀ / ‖W + s·B A‖ + b and dy is the gradient of y.

    Shapes: x (N, in), dy (N, out), W (out, in), A (r, in), B (out, r) -> (out)
    """
    raise NotImplementedError
