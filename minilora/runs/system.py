"""The machine that a run computes on: memory that is used, free and kept, and the number of threads.

A step frees the memory that it allocated, and the next one allocates it again. The C library returns it to the system,
which zeroes it before it is used again: that took 10 to 25 % of a step of SmolLM2 on a CPU. So a run keeps its freed
memory where there is room (`keep_memory`).

At the end of each matrix product the threads wait for the slowest one. Where products are tiny, or other programs keep
the cores busy, one thread is often faster than all of them (`choose_threads`).
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn

from minilora.runs.config import TrainConfig
from minilora.runs.objective import Objective, check_token_loss
from minilora.runs.sampler import groups, set_dropout_step

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
    if (found := _kilobytes("proc/self/status", "VmHWM")) is not None:
        return found
    try:
        import resource
    except ImportError:  # Windows has no such module
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _kilobytes(file: str, field: str) -> int | None:
    """Return a field of one of Linux's files, "NAME: N kB", in bytes."""
    path = LINUX / file
    found = re.search(rf"^{field}:\s+(\d+) kB$", path.read_text(), re.MULTILINE) if path.is_file() else None
    return int(found[1]) * 1024 if found else None


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


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # options of glibc's malloc.h
KEEPING = {M_TRIM_THRESHOLD: -1, M_MMAP_MAX: 0}
RETURNING = {M_TRIM_THRESHOLD: 64 * 2**20, M_MMAP_MAX: 65536}
ROOM = 3  # times what a step takes


@contextmanager
def returned_memory() -> Iterator[None]:
    """Return freed memory to the system at the end of the block, and end `keep_memory`."""
    try:
        yield
    finally:
        _set_options(RETURNING)
        _call_libc("malloc_trim", 0)


def keep_memory() -> None:
    """Keep memory that is freed from now on in the process, if there is room for three times what a step took.

    For after the first step. Kept memory is in pieces, which larger tensors do not fit into, so it grows: a run with 7
    billion parameters in four bits peaked at 9.7 to 11.8 GB with it, and at 7.4 GB without.
    """
    _call_libc("malloc_trim", 0)
    free, now = free_memory_bytes(torch.device("cpu")), _kilobytes("proc/self/status", "VmRSS")
    # What a step took is at most the difference between the most that the process has used and what it uses now.
    if free is None or now is None or free >= ROOM * (high_water_bytes() - now):
        _set_options(KEEPING)


def _set_options(options: dict[int, int]) -> None:
    for option, value in options.items():
        _call_libc("mallopt", option, value)


def _call_libc(name: str, *arguments: int) -> None:
    """Call a function of glibc; without glibc this does nothing."""
    with suppress(AttributeError, OSError, TypeError):  # no such function, no such library, Windows
        getattr(ctypes.CDLL(None), name)(*arguments)


MAX_PARAMETERS = 200_000_000  # a larger model has large products, for which all threads are faster
MAX_TOKENS = 256  # of the rows that are timed
MAX_SECONDS = 2.0  # of all rounds together, after which no further one follows
ROUNDS = 10


def choose_threads(model: nn.Module, dataset: Sequence[Any], config: TrainConfig) -> int | None:
    """Set the number of threads to one or to all: the one whose slowest step with a few rows is the faster.

    Beside other programs, several threads are fast in most steps, and many times slower where one has to wait its turn.
    Return the number, or None where nothing is measured: with OMP_NUM_THREADS set, with one thread, on another device,
    or for a large model.
    """
    threads, device = torch.get_num_threads(), next(model.parameters()).device
    is_small = sum(p.numel() for p in model.parameters()) <= MAX_PARAMETERS
    if "OMP_NUM_THREADS" in os.environ or threads == 1 or device.type != "cpu" or not is_small:
        return None
    check_token_loss(model, dataset)
    objective, was_training = Objective(config), model.training
    rows = [dataset[row] for row in next(groups(objective.lengths(dataset), MAX_TOKENS))]

    def seconds(number: int) -> float:
        torch.set_num_threads(number)
        began = perf_counter()
        objective(model, rows)[0].backward()
        return perf_counter() - began

    slowest = {1: 0.0, threads: 0.0}
    model.train()
    set_dropout_step(model, config.seed, 0)
    try:
        seconds(1)  # not counted: the first step also prepares the kernels
        began = perf_counter()
        for _ in range(ROUNDS):
            for number in slowest:
                slowest[number] = max(slowest[number], seconds(number))
            if perf_counter() - began > MAX_SECONDS:
                break
    finally:
        set_dropout_step(model, None)
        model.train(was_training)
        model.zero_grad()
    found = min(slowest, key=slowest.__getitem__)
    torch.set_num_threads(found)
    return found
