"""Exercise 6: three functions on rank. For the verdict: python tutorials/exercises/check.py 06"""

from torch import Tensor


def best_adapter(delta: Tensor, r: int, s: float) -> tuple[Tensor, Tensor, float]:
    """The A and B of rank r for which s·B A is nearest to ΔW, and the loss ‖ΔW - s·B A‖² that must remain.

    ‖·‖² is the sum of the squares of all numbers. The loss is told from the singular values alone.

    Shapes: delta (out, in) -> A (r, in), B (out, r)
    """
    raise NotImplementedError


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
