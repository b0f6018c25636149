"""Exercise 4: a step and the backward pass by hand. For the verdict: python tutorials/exercises/check.py 04"""

from torch import Tensor


def change_of_delta(G: Tensor, A: Tensor, B: Tensor, s: float, rate: float) -> Tensor:
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


def share_seen(G: Tensor, A: Tensor) -> float:
    """The share of the energy of G that lies in the space of the rows of A, which are not parallel.

    Shapes: G (out, in), A (r, in)
    """
    raise NotImplementedError
