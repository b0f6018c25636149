"""Which function answers a call: a definition of the six pages, or a kernel that is registered behind it.

A definition is the plain function, as its page says it. A kernel has the same signature and computes the same, faster
or in less memory; it calls the definition where it has nothing better. Without `minilora.kernel` there are none.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, ParamSpec, TypeVar

from minilora.errors import ConfigError

P = ParamSpec("P")
R = TypeVar("R")


class Definition(Generic[P, R]):
    """A function of a page (final). `function` is what the page says, `kernel` what may answer in its place."""

    __name__: str

    def __init__(self, function: Callable[P, R]):
        self.function = function
        self.kernel: Callable[P, R] | None = None
        self.is_plain = False
        functools.update_wrapper(self, function)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if self.kernel is None or self.is_plain:
            return self.function(*args, **kwargs)
        return self.kernel(*args, **kwargs)


WITH_KERNEL: dict[str, Definition] = {}  # type: ignore[type-arg]  # by name, in the order of registration


def definition(function: Callable[P, R]) -> Definition[P, R]:
    """Mark a function as a definition, behind which a kernel can be registered."""
    return Definition(function)


def kernel(of: Definition[P, R]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Register the decorated function as the kernel of a definition."""

    def register(function: Callable[P, R]) -> Callable[P, R]:
        of.kernel = function
        WITH_KERNEL[of.__name__] = of
        return function

    return register


def kernels() -> list[str]:
    """List the definitions that have a kernel, by name."""
    return list(WITH_KERNEL)


@contextmanager
def plain(*names: str) -> Iterator[None]:
    """Compute as the definitions say, without these kernels, or without any, for as long as the block lasts.

    Raises:
        ConfigError: no kernel has that name.
    """
    if unknown := [name for name in names if name not in WITH_KERNEL]:
        raise ConfigError(f"plain: there is no kernel {unknown[0]!r}; there are {kernels()}")
    chosen = [WITH_KERNEL[name] for name in names or WITH_KERNEL]
    before = [each.is_plain for each in chosen]
    try:
        for each in chosen:
            each.is_plain = True
        yield
    finally:
        for each, was_plain in zip(chosen, before, strict=True):
            each.is_plain = was_plain
