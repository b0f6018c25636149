"""Exercise 8: three functions on memory. For the verdict: python tutorials/exercises/check.py 08"""


def trained_bytes(shapes: list[tuple[int, int]], r: int | None) -> int:
    """All bytes that training keeps for linears of shapes (out, in), without activations.

    Everything is in float32, a frozen weight too. With a rank each weight is frozen, and A and B are trained; with None
    it is trained itself. For each number that is trained, AdamW keeps two more, and backward makes one.
    """
    raise NotImplementedError


def micro_batches(rows: int, row_bytes: int, fixed: int, budget: int) -> int | None:
    """The smallest number of equal micro-batches by which a batch fits into a budget of bytes; None if none does.

    `fixed` bytes are needed at all times, and each row of a micro-batch takes `row_bytes` of activations. The
    micro-batches have the same number of rows, so their number divides `rows`.
    """
    raise NotImplementedError


def ranks(shapes: dict[str, tuple[int, int]], budget: int) -> dict[str, int]:
    """Return the rank of an adapter on each linear, so that weights and training fit into `budget` bytes.

    `shapes` are (out, in) by name. Each weight is kept in NF4 with double quantization, as in the chapter's
    `nf4_bytes`. All that is trained is in float32: A and B, their gradients, and two moments of each.

    First find the largest rank that all linears can have. Then go through them in their order, once, and give one rank
    more to each for which the rest of the budget is enough. If not even rank 1 fits on all, every rank begins
    at 0. If the budget does not even hold the weights, every rank stays 0.
    """
    raise NotImplementedError
