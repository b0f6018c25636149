"""Exercise 11: the error of a merge, before it is made. For the verdict: python tutorials/exercises/check.py 11"""

from collections.abc import Callable

from torch import Tensor


def merge_error(layers: list[tuple[Tensor, Tensor, Tensor, float]], store: Callable[[Tensor], Tensor]) -> float:
    """‖W' - (W + ΔW)‖ / ‖ΔW‖ over all layers (W, A, B, s) together, with ΔW = s·B A and W' = store(W + ΔW).

    `store` rounds a weight as it will be stored, to bfloat16 or to four bits, and returns it as it is read back. Norms
    are of all numbers of all layers. Everything else is computed in float64, and nothing that was given is changed.

    Shapes: W (out, in) bfloat16, A (r, in), B (out, r), with other sizes for each layer
    """
    raise NotImplementedError
