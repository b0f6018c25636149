"""Exercise 4: a scale from a measured curve. For the verdict: python tutorials/exercises/check.py 04"""


def stable_scale(ranks: list[int], sizes: list[float], alpha: float, r: int) -> float:
    """The scale s of rank r with which the size of the gradient is the same for every rank; at rank 1 it is alpha.

    `sizes` were measured at `ranks` with s = 1, and grow about as a power of the rank, c·r^p. The size is proportional
    to s. Measurements are noisy: p is the slope of the line, by least squares, through all points on a log-log plot.
    """
    raise NotImplementedError
