"""Exercise 12: the gradient of m, another start, and a verdict. To be judged: python tutorials/exercises/check.py 12"""

from torch import Tensor

# Student's t for the 95 % interval of a mean, by the number of values
STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


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


def verdict(differences: list[float], margin: float) -> str:
    """Say "equal", "different" or "undecided" of two methods, by the paired differences of several seeds.

    The 95 % interval of the mean is that of Student's t. The methods are equal if it lies within ± margin, otherwise
    different if it does not contain 0, and otherwise undecided. 2 to 10 differences that are not all the same.
    """
    raise NotImplementedError
