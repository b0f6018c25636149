"""Exercise 8: ranks for a budget of bytes. For the verdict: python tutorials/exercises/check.py 08"""


def ranks(shapes: dict[str, tuple[int, int]], budget: int) -> dict[str, int]:
    """Return the rank of an adapter on each linear, so that weights and training fit into `budget` bytes.

    `shapes` are (out, in) by name. Each weight is kept in NF4 with double quantization, as in the chapter's
    `nf4_bytes`. All that is trained is in float32: A and B, their gradients, and two moments of each.

    First find the largest rank that all linears can have. Then go through them in their order, once, and give one rank
    more to each for which the rest of the budget is enough. Where not even rank 1 fits on all, they begin at 0, and
    where the budget does not hold the weights, they stay there.
    """
    raise NotImplementedError
