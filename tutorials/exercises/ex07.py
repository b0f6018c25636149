"""Exercise 7: adapters for an unknown model. For the verdict: python tutorials/exercises/check.py 07"""

from collections.abc import Callable, Collection

from torch import nn


def attach(model: nn.Module, names: Collection[str], wrap: Callable[[nn.Linear], nn.Module]) -> int:
    """Put an adapter, `wrap(linear)`, where each linear of these names stands, and return how many adapters there are.

    The name of a module is the last part of its path, whole: "proj" does not mean "q_proj". Only linears are meant, at
    any depth. A linear that stands in several places of these names gets one adapter, which stands in all of them.
    Afterwards the adapters' own parameters are trained, and those of the model are frozen.
    """
    raise NotImplementedError
