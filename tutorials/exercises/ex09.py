"""Exercise 9: a code that beats NF4. For the verdict: python tutorials/exercises/check.py 09"""

from torch import Tensor


def fit(block_size: int) -> Tensor:
    """16 rising levels from -1 to 1, with an exact 0, for normal numbers divided by the absmax of their block.

    At block 4,096 their mean absolute error is at least 5 % less than NF4's, at block 64 not more than 1 % greater.

    Shapes: -> (16) float32
    """
    raise NotImplementedError
