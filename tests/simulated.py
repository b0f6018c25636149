"""A simulated accelerator, the device "sim": the CPU computes, but no operation takes tensors of both devices.

Importing this module makes the device known to PyTorch, which it has to be before the first backward pass of a process.
Its rules are those of CUDA and, in `without_float64`, of MPS. It has its own random state and memory. `traffic` records
what slows down a real device, with lines of the code: copies, and operations that make the processor wait for it.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _DummyPrivateUse1Hook,
    _setup_privateuseone_for_python_backend,
)

ROOT = Path(__file__).parents[1]
aten = torch.ops.aten
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
WAITING = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)


OPERATIONS: set[str] = set()  # the names of all operations that a tensor of the device went through


class Event(NamedTuple):
    """A copy or a wait."""

    operation: str
    line: str  # of the repository, "FILE:NUMBER", or "backward" in a backward pass of PyTorch's own
    bytes: int  # that were copied


class Traffic(NamedTuple):
    """What happened, in order."""

    copies: list[Event]  # of tensors of the CPU to the device
    waits: list[Event]  # for what the device computes: a copy from it, or a copy to it that is not `non_blocking`


RECORDS: list[Traffic] = []  # of the blocks of `traffic` that are open


@contextmanager
def traffic() -> Iterator[Traffic]:
    """Record copies and waits inside the block."""
    RECORDS.append(Traffic([], []))
    try:
        yield RECORDS[-1]
    finally:
        RECORDS.pop()


def record(kind: str, func: Any, size: int = 0) -> None:
    for each in RECORDS:
        getattr(each, kind).append(Event(str(func), current_line(), size))


def current_line() -> str:
    """Return the innermost line of the repository, except for this file's, that is being executed."""
    frame: Any = sys._getframe()
    while frame:
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(ROOT) and file != Path(__file__) and "site-packages" not in file.parts:
            return f"{file.relative_to(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return "backward"


class Memory:
    """The bytes of the storages of the device that live, and the most so far."""

    def __init__(self) -> None:
        self.live = self.peak = 0
        self._known = weakref.WeakSet[torch.UntypedStorage]()

    def add(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._known:
            self._known.add(storage)
            weakref.finalize(storage, self._free, storage.nbytes()).atexit = False
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)

    def _free(self, size: int) -> None:
        self.live -= size

    def start(self) -> int:
        """Let the peak begin anew, and return the bytes that live."""
        gc.collect()
        self.peak = self.live
        return self.live


MEMORY = Memory()
RANDOM = torch.Generator()  # the device's random state


@contextmanager
def own_random_state() -> Iterator[None]:
    """Let the CPU draw from the device's random state inside the block."""
    kept = torch.get_rng_state()
    torch.set_rng_state(RANDOM.get_state())
    try:
        yield
    finally:
        RANDOM.set_state(torch.get_rng_state())
        torch.set_rng_state(kept)


REFUSED: set[torch.dtype] = set()


@contextmanager
def without_float64() -> Iterator[None]:
    """Refuse tensors in float64 inside the block, as MPS does."""
    REFUSED.add(torch.float64)
    try:
        yield
    finally:
        REFUSED.clear()


class SimTensor(Tensor):
    """A tensor of the device; `raw` is the CPU's tensor of its numbers."""

    raw: Tensor

    @staticmethod
    def __new__(cls, raw: Tensor) -> SimTensor:
        layout = {"strides": raw.stride(), "storage_offset": raw.storage_offset()}
        return Tensor._make_wrapper_subclass(cls, raw.size(), **layout, dtype=raw.dtype, device="sim:0")

    def __init__(self, raw: Tensor):
        if raw.dtype in REFUSED:
            raise TypeError(f"the device has no {raw.dtype}; at {current_line()}")
        self.raw = raw
        MEMORY.add(raw.untyped_storage())

    def __repr__(self) -> str:
        return f"SimTensor({self.raw!r})"

    def tolist(self) -> Any:  # PyTorch has none for subclasses
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute an operation that has a tensor of the device among its arguments."""
        kwargs = kwargs or {}
        OPERATIONS.add(str(func))
        if func is aten.copy_.default:
            return copy_(*args)
        if func is aten._to_copy.default:
            options = {key: value for key, value in kwargs.items() if key != "non_blocking"}
            return torch.empty_like(args[0], **options).copy_(args[0])
        check(func, (*args, *kwargs.values()))
        device = torch.device(kwargs.get("device") or "sim")
        raw_kwargs = {key: convert(unwrap, value) for key, value in kwargs.items()}
        if "device" in kwargs:
            raw_kwargs["device"] = "cpu" if device.type == "sim" else device
        draws = torch.Tag.nondeterministic_seeded in func.tags and kwargs.get("generator") is None
        with own_random_state() if draws else nullcontext():
            result = func(*convert(unwrap, args), **raw_kwargs)
        if device.type != "sim":
            return result
        return return_and_correct_aliasing(func, args, kwargs, convert(SimTensor, result))


def check(func: Any, args: Any) -> None:
    """Refuse an operation on tensors of both devices, and record one that waits.

    As on CUDA, a tensor of the CPU may be a single number, or an index, for whose copy the processor waits. It waits
    for a mask as an index as well.
    """
    waits = any(tag in func.tags for tag in WAITING)
    if func in INDEXING:
        indices = [index for index in args[1] if index is not None]
        for index in filter(is_foreign, indices):
            record("copies", func, index.nbytes)
        waits = any(is_foreign(index) or index.dtype in (torch.bool, torch.uint8) for index in indices)
        args = (args[0], *args[2:])
    if any(is_foreign(tensor) and tensor.dim() for tensor in tensors_of(args)):
        raise RuntimeError(f"sim:0 and cpu are not the same device, in {func} at {current_line()}")
    if waits:
        record("waits", func)


def is_foreign(tensor: Tensor) -> bool:
    return not isinstance(tensor, SimTensor)


def tensors_of(x: Any) -> Iterator[Tensor]:
    """Yield the tensors of an operation's arguments, which may be in lists."""
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, list | tuple):
        for each in x:
            yield from tensors_of(each)


def convert(function: Callable[[Tensor], Tensor], x: Any) -> Any:
    """Apply a function to each of these tensors, or to those of a result."""
    if isinstance(x, Tensor):
        return function(x)
    if isinstance(x, list | tuple):
        return type(x)(convert(function, each) for each in x)
    return x


def unwrap(x: Tensor) -> Tensor:
    return x.raw if isinstance(x, SimTensor) else x


def copy_(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    if is_foreign(source) and not is_foreign(target):
        record("copies", aten.copy_.default, source.nbytes)
        if not non_blocking:
            record("waits", aten.copy_.default)
    if not is_foreign(source) and target.is_cpu:
        record("waits", aten.copy_.default, source.nbytes)
    unwrap(target).copy_(unwrap(source))
    return target


def silu_backward(grad: Tensor, x: Tensor) -> Tensor:
    """Compute in one operation, as CUDA and MPS do, what other devices compute in several."""
    return SimTensor(aten.silu_backward.default(unwrap(grad), unwrap(x)))


def empty(size: Any, *, device: Any, dtype: Any = None, memory_format: Any = None, **_: Any) -> Tensor:
    if device.index:
        raise RuntimeError(f"the only device of its kind is sim:0, not {device}")
    return SimTensor(torch.empty(size, dtype=dtype, memory_format=memory_format or torch.contiguous_format))


def empty_strided(size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> Tensor:
    return SimTensor(torch.empty_strided(size, stride, dtype=dtype))


class Generator(torch.Generator):
    """Replaces `torch.Generator`, of which a backend in Python has none: with a seed the device draws as the CPU."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        return super().__new__(cls, "cpu" if torch.device(device).type == "sim" else device)


class Hooks(_DummyPrivateUse1Hook):
    def is_available(self) -> bool:  # or libraries would choose the device by themselves
        return False


class Backend(_DummyBackendModule):
    """The module `torch.sim`. Whoever looks for devices finds none."""

    def is_available(self) -> bool:
        return False

    def device_count(self) -> int:
        return 0

    def get_rng_state(self, device: Any = None) -> Tensor:
        return RANDOM.get_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        RANDOM.set_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


_setup_privateuseone_for_python_backend("sim", Backend(), Hooks())
LIBRARY = torch.library.Library("aten", "IMPL")
# From these three PyTorch builds `zeros`, `tensor`, `to` and the like.
LIBRARY.impl("empty.memory_format", empty, "PrivateUse1")
LIBRARY.impl("empty_strided", empty_strided, "PrivateUse1")
LIBRARY.impl("copy_", copy_, "PrivateUse1")
LIBRARY.impl("silu_backward", silu_backward, "PrivateUse1")
