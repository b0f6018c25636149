"""Exercise 1: several adapters, one weight. For the verdict: python tutorials/exercises/check.py 01"""

from torch import Tensor


def merge(W: Tensor, adapters: list[tuple[Tensor, Tensor, float]]) -> Tensor:
    """W + Σ s·B A over all (A, B, s) of `adapters`. The W that was given stays as it was.

    Shapes: W (out, in), A (r, in), B (out, r), with another r for each adapter -> (out, in)
    """
    raise NotImplementedError
