"""Exercise 13: what subspaces share, and what a change amplifies. Verdict: python tutorials/exercises/check.py 13"""

from torch import Tensor


def chance(phi: float, i: int, j: int, n: int) -> float:
    """The share of pairs of random subspaces, of i and j of n dimensions, whose φ(i, j) is at least phi, to ± 0.05."""
    raise NotImplementedError


def shared(one: tuple[Tensor, Tensor], two: tuple[Tensor, Tensor], k: int) -> float:
    """φ(k, k) of the first k input directions of two adapters (A, B), whose ΔW = B A have at least the rank k.

    Shapes: A (r, in), B (out, r), with another r for each adapter
    """
    raise NotImplementedError


def amplification(W: Tensor, A: Tensor, B: Tensor, s: float, k: int) -> float:
    """‖ΔW cut to rank k‖ / ‖Uₖᵀ W Vₖ‖, where ΔW = s·B A has the singular vectors U and V, of which the first k count.

    Shapes: W (out, in), A (r, in), B (out, r)
    """
    raise NotImplementedError
