"""The memory of the machine that a run computes on: what is used, free and kept.

A step frees the memory that it allocated, and the next one allocates it again. The C library returns it to the system,
which zeroes it before it is used again: that took 10 to 25 % of a step of SmolLM2 on a CPU. So the command keeps the
freed memory of small tensors while it trains (`kept_memory`).
"""

import ctypes
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

LINUX = Path("/")  # where /proc and /sys are


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory that was used so far.

    On CUDA by tensors on the device; elsewhere by the process, less what it had used when minilora was imported: the
    interpreter and PyTorch's own code.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return high_water_bytes() - AT_IMPORT


def high_water_bytes() -> int:
    """Return the most memory that the process has used so far; 0 where the system does not report it."""
    # getrusage would include the process that started this one.
    if (high_water := _kilobytes("proc/self/status", "VmHWM")) is not None:
        return high_water
    try:
        import resource
    except ImportError:  # Windows has no such module
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _kilobytes(file: str, field: str) -> int | None:
    """Return a field of one of Linux's files, "NAME: N kB", in bytes."""
    path = LINUX / file
    match = re.search(rf"^{field}:\s+(\d+) kB$", path.read_text(), re.MULTILINE) if path.is_file() else None
    return int(match[1]) * 1024 if match else None


AT_IMPORT = high_water_bytes()


def free_memory_bytes(device: torch.device) -> int | None:
    """Return the memory that is free: of the GPU on CUDA, else of the machine and within the limits of the process.

    Of the machine's, each rank that torchrun has started there gets its share. On macOS it is all of the machine's
    memory, since the system makes room as needed. None where nothing is known.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if sys.platform == "darwin":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    available, ranks = _kilobytes("proc/meminfo", "MemAvailable"), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return None if available is None else min([available, *_free_in_groups()]) // ranks


def _free_in_groups() -> Iterator[int]:
    """Yield the memory that is free in each control group of the process that has a limit, and in those around it."""
    groups, top = LINUX / "proc/self/cgroup", LINUX / "sys/fs/cgroup"
    found = re.search(r"^0::/(.*)$", groups.read_text(), re.MULTILINE) if groups.is_file() else None
    group = top / found[1] if found else top
    for folder in (group, *group.parents):  # in a container the path may be the one outside, and is not there
        if not folder.is_relative_to(top):
            break
        with suppress(OSError):  # no such group, or one without a limit
            most, used = (folder / "memory.max").read_text().strip(), int((folder / "memory.current").read_text())
            cached = re.search(r"^inactive_file (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE)
            if most != "max":  # files that were read, and can be read again, do not count as used
                yield max(0, int(most) - used + (int(cached[1]) if cached else 0))


def amount(size: int) -> str:
    """Format a number of bytes; GB are 10⁹ bytes."""
    power = min((len(str(size)) - 1) // 3, 3)
    return f"{size / 1000**power:,.1f} {('', 'kB', 'MB', 'GB')[power]}" if power else f"{size} bytes"


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # options of glibc's malloc.h


@contextmanager
def kept_memory(size: int = 2**25) -> Iterator[None]:
    """Keep freed memory of tensors below a size in the process within the block; return it to the system at its end.

    Larger tensors return theirs at once: kept memory is in pieces that they do not fit into, so it would grow. glibc
    accepts sizes up to 32 MB, 2^25.
    """
    _call_libc("mallopt", M_TRIM_THRESHOLD, -1)
    _call_libc("mallopt", M_MMAP_THRESHOLD, size)
    try:
        yield
    finally:
        _call_libc("mallopt", M_MMAP_THRESHOLD, 2**25)  # both limits grow so far by themselves
        _call_libc("mallopt", M_TRIM_THRESHOLD, 2**26)
        _call_libc("malloc_trim", 0)


def _call_libc(name: str, *arguments: int) -> None:
    """Call a function of glibc; without glibc this does nothing."""
    with suppress(AttributeError, OSError, TypeError):  # no such function, no such library, Windows
        getattr(ctypes.CDLL(None), name)(*arguments)
