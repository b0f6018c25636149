"""Exercise 4: a step and the backward pass by hand. For the verdict: python tutorials/exercises/check.py 04"""

from torch import Tensor


def change_of_delta(G: Tensor, A: Tensor, B: Tensor, s: float, rate_A: float, rate_B: float) -> Tensor:
    """By how much one step of SGD on A and B moves ΔW = s·B A, where G is the gradient that W would have.

    Shapes: G (out, in), A (r, in), B (out, r) -> (out, in)
    """
    raise NotImplementedError


def lora_backward(dy: Tensor, x: Tensor, W: Tensor, A: Tensor, B: Tensor, s: float) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, A and B for y = x Wᵀ + s·x Aᵀ Bᵀ, where dy is that of y; W is frozen.

    x and dy have two or more dimensions. Nothing as large as W is formed, and no gradient is asked of PyTorch.

    Shapes: dy (..., out), x (..., in), W (out, in), A (r, in), B (out, r) -> dx (..., in), dA (r, in), dB (out, r)
    """
    raise NotImplementedError


def share_seen(G: Tensor, A: Tensor, B: Tensor) -> float:
    """The share of the energy of G that the rows of A or the columns of B see.

    No row of A is a mixture of its others, and no column of B.

    Shapes: G (out, in), A (r, in), B (out, r)
    """
    raise NotImplementedError
