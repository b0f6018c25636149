"""Exercise 2: the loss by hand. For the verdict: python tutorials/exercises/check.py 02"""

from torch import Tensor


def mean_loss(rows: list[tuple[Tensor, list[int]]]) -> float:
    """The mean of -log p(token) over the labelled tokens of all rows together.

    A row is (logits, labels). labels[i] is token i where that is learned, and -100 elsewhere. logits[i] is what the
    model says after it has read the tokens 0 to i, about the token that comes next; softmax makes probabilities of it.

    Shapes: logits (T, V); T labels
    """
    raise NotImplementedError
