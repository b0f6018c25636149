"""Exercise 6: three functions on rank. For the verdict: python tutorials/exercises/check.py 06"""

from torch import Tensor


def rank_for(A: Tensor, B: Tensor, share: float) -> int:
    """The smallest rank whose best cut of B A keeps at least this share of the energy ‖B A‖², 0 < share < 1.

    Nothing as large as B A is formed.

    Shapes: A (r, in), B (out, r)
    """
    raise NotImplementedError


def stack(adapters: list[tuple[Tensor, Tensor, float]]) -> tuple[Tensor, Tensor]:
    """One A and one B with B A = Σ sᵢ Bᵢ Aᵢ. An adapter is (A, B, s); the rank is the sum of all ranks.

    Shapes: A (r, in), B (out, r) of each -> A (Σ r, in), B (out, Σ r)
    """
    raise NotImplementedError


def best_for(delta: Tensor, x: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """The A and B of rank r for which ‖x ΔWᵀ - x (B A)ᵀ‖² is least: whose outputs on the rows of x are the nearest.

    Shapes: delta (out, in), x (rows, in) -> A (r, in), B (out, r)
    """
    raise NotImplementedError
