"""Exercise 13: what a change amplifies. For the verdict: python tutorials/exercises/check.py 13"""

from torch import Tensor


def amplification(W: Tensor, A: Tensor, B: Tensor, s: float, k: int) -> float:
    """‖ΔW cut to rank k‖ / ‖Uₖᵀ W Vₖ‖, where ΔW = s·B A has the singular vectors U and V, of which the first k count.

    Shapes: W (out, in), A (r, in), B (out, r)
    """
    raise NotImplementedError
