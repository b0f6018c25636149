"""The C library's memory: kept from step to step while a run lasts, then given back.

A step frees all that it took, and the next takes the same again. glibc hands large pieces back to the system at once,
which clears each page before it lends it out again: of a step of SmolLM2 on a CPU that was a tenth to a quarter. Its
other threads have pieces of 64 MB for themselves, of which this is not true.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, suppress

# Options of glibc's malloc.h. Their values cannot be read, and setting one turns off its automatic adjustment, so
# afterwards each is left at the largest value that the adjustment would have reached.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
LEFT_AT = {M_TRIM_THRESHOLD: 64 * 2**20, M_MMAP_THRESHOLD: 32 * 2**20, M_MMAP_MAX: 65536}
KEEPING = {M_TRIM_THRESHOLD: -1, M_MMAP_MAX: 0}


@contextmanager
def kept_memory() -> Iterator[None]:
    """Within it, freed memory stays with the process; glibc can, elsewhere nothing happens.

    It holds for the whole process: where two overlap, the first to end ends both.
    """
    _set(KEEPING)
    try:
        yield
    finally:
        _set(LEFT_AT)
        release_memory()


def release_memory() -> None:
    """Give back to the system what the C library keeps of freed memory; glibc can, elsewhere nothing happens."""
    with suppress(AttributeError, OSError, TypeError):  # no such function, no such library, Windows
        ctypes.CDLL(None).malloc_trim(0)


def _set(options: dict[int, int]) -> None:
    with suppress(AttributeError, OSError, TypeError):
        for option, value in options.items():
            ctypes.CDLL(None).mallopt(option, value)
