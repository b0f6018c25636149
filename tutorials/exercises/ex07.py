"""Exercise 7: three functions on where adapters go. For the verdict: python tutorials/exercises/check.py 07"""

from collections.abc import Callable, Collection

from torch import nn


def largest_rank(shapes: list[tuple[int, int]], budget: int) -> int:
    """The highest rank that adapters on linears of shapes (in, out) can all have, with `budget` numbers in total."""
    raise NotImplementedError


def count_places(model: nn.Module) -> dict[str, int]:
    """The names of the model's linears, each with the number of places in which a linear has that name.

    A place is a module and the name of one of its children. The name is the last part of a path: of "blocks.0.q_proj"
    it is "q_proj". A linear with two names, or in two blocks, is in two places.
    """
    raise NotImplementedError


def attach(model: nn.Module, names: Collection[str], wrap: Callable[[nn.Linear], nn.Module]) -> int:
    """Put an adapter, `wrap(linear)`, where each linear of these names stands, and return how many adapters there are.

    The name of a module is the last part of its path, whole: "proj" does not mean "q_proj". Only linears are meant, at
    any depth. A linear that stands in several places of these names gets one adapter, which stands in all of them.
    Afterwards the adapters' own parameters are trained, and those of the model are frozen.
    """
    raise NotImplementedError
