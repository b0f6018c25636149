"""Exercise 4: the backward pass by hand. For the verdict: python tutorials/exercises/check.py 04"""

from torch import Tensor


def lora_backward(dy: Tensor, x: Tensor, W: Tensor, A: Tensor, B: Tensor, s: float) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, A and B for y = x Wᵀ + s·x Aᵀ Bᵀ, where dy is that of y; W is frozen.

    Nothing as large as W is formed, and no gradient is asked of PyTorch.

    Shapes: dy (..., out), x (..., in), W (out, in), A (r, in), B (out, r) -> dx (..., in), dA (r, in), dB (out, r)
    """
    raise NotImplementedError
