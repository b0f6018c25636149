"""Dispatch between the definition of a function on one of the six pages and a kernel that is registered for it.

A definition is the plain function. A kernel has the same signature and the same result, and is faster or takes less
memory. A kernel that has nothing better calls `definition.function`; calling the definition would call the kernel
again. Kernels are registered when `minilora.kernels` is imported.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar

from minilora.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


class Definition(Generic[P, R]):
    """A function of a page (final), and the kernel that may replace it."""

    __name__: str

    def __init__(self, function: Callable[P, R]):
        self.function = function
        self.kernel: Callable[P, R] | None = None
        self.disabled = 0  # how many blocks of `plain` are open
        functools.update_wrapper(self, function)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if self.kernel is None or self.disabled:
            return self.function(*args, **kwargs)
        return self.kernel(*args, **kwargs)


definition = Definition  # as a decorator: marks a function, behind which a kernel can be registered
WITH_KERNEL: dict[str, Definition] = {}  # type: ignore[type-arg]  # by name, in the order of registration


def kernel(of: Definition[P, R]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Register the decorated function as the kernel of a definition."""

    def register(function: Callable[P, R]) -> Callable[P, R]:
        of.kernel = function
        WITH_KERNEL[of.__name__] = of
        return function

    return register


def is_plain() -> bool:
    """Return whether a block of `plain` disables all kernels."""
    return all(own.disabled for own in WITH_KERNEL.values())


@contextmanager
def plain(*names: str) -> Iterator[None]:
    """Use the definitions instead of these kernels, or of all kernels if none is named, inside the block.

    The switch is global to the process. Call `backward()` inside the block too: recomputed layers run again there.

    Raises:
        ConfigError: no kernel has that name.
    """
    if unknown := [name for name in names if name not in WITH_KERNEL]:
        raise ConfigError(f"plain: no kernel is named {unknown}; there are {list(WITH_KERNEL)}")
    chosen = [WITH_KERNEL[name] for name in names or WITH_KERNEL]
    for own in chosen:
        own.disabled += 1
    try:
        yield
    finally:
        for own in chosen:
            own.disabled -= 1


def no_autocast(device_type: str) -> Any:
    """Let products keep the dtype of their operands inside a block: autocast would round B A to 16 bits."""
    import torch  # here, so that `minilora --help` does not import PyTorch

    is_there = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if is_there else nullcontext()


def cached_on_device(table: Tensor, device: torch.device) -> Tensor:
    """Return a constant tensor on a device. It is copied there once, not in every step."""
    import torch

    # Copies of a compiler and on "meta" have no numbers, so they are not cached.
    has_numbers = device.type != "meta" and not torch.compiler.is_compiling()
    return _copy(table, device) if has_numbers else table.to(device)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device without waiting, except on MPS, which may read a tensor that is freed meanwhile."""
    return tensor.to(device, non_blocking=device.type != "mps")


@functools.cache
def _copy(table: Tensor, device: torch.device) -> Tensor:
    return table.to(device)
