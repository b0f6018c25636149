"""Exercise 5: three questions on scale and rate. For the verdict: python tutorials/exercises/check.py 05"""


def first_gradient(norm: float, width: int, r: int, alpha: float) -> float:
    """The norm to expect of B's first gradient, where that of W has this norm, A is PEFT's, and the scale is α/r."""
    raise NotImplementedError


def signal_and_noise(squares: dict[int, float]) -> tuple[float, float]:
    """‖g‖² and σ², from the mean squared norm of the gradient at two sizes of a batch, {rows: mean square}."""
    raise NotImplementedError


def same_training(s: float, rate: float, new_s: float) -> tuple[float, float]:
    """The rates of A and of B with which Adam trains the same ΔW under another scale, from the same start of A."""
    raise NotImplementedError
