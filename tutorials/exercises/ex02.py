"""Exercise 2: the loss by hand, in four small parts. For the verdict: python tutorials/exercises/check.py 02"""

from collections.abc import Mapping

from torch import Tensor


def steps(rows: int, batch_size: int, epochs: int) -> int:
    """How many steps a run makes that reads all rows `epochs` times. The last batch of an epoch may be smaller."""
    raise NotImplementedError


def token_losses(logits: Tensor, labels: list[int]) -> list[float]:
    """-log p of each labelled token of one row, in order.

    labels[i] is token i where that is learned, and -100 elsewhere. logits[i] is what the model says after it has read
    the tokens 0 to i, about the token that comes next; softmax makes probabilities of it.

    Shapes: logits (T, V); T labels
    """
    raise NotImplementedError


def mean_loss(rows: list[tuple[Tensor, list[int]]]) -> float:
    """The mean of -log p over the labelled tokens of all rows, (logits, labels), together."""
    raise NotImplementedError


def best_step(evaluations: Mapping[int, float]) -> int:
    """The step whose adapter `--keep best` keeps, from the validation loss by step; of equals, the first."""
    raise NotImplementedError
