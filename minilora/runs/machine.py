"""The machine that a run computes on: how much memory is taken and free, freed memory kept, the number of threads.

A step frees all that it took, and the next takes the same again. glibc hands large pieces back to the system at once,
which clears each page before it lends it out again: of a step of SmolLM2 on a CPU that was a tenth to a quarter. Its
other threads have pieces of 64 MB for themselves, of which this is not true.

At the end of each product the threads wait for the slowest one. Where products are tiny, or other programs keep the
cores busy, one thread is therefore often faster than all of them.
"""

from __future__ import annotations

import ctypes
import os
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn

from minilora.runs.config import TrainConfig
from minilora.runs.objective import TokenLoss
from minilora.runs.seeded import plan_steps, set_dropout_step

LINUX = Path("/")  # where /proc and /sys are
STAT = {
    "v2": ("memory.max", "memory.current", "inactive_file"),
    "v1": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory so far, the program itself aside.

    On CUDA the most that tensors have taken there; elsewhere the most that the process has held, minus what that was
    when minilora was imported: the interpreter and PyTorch's own code.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return high_water_bytes() - AT_IMPORT


def held_memory_bytes(device: torch.device) -> int:
    """What the process holds now, the program itself aside: rows, a tokenizer, what PyTorch has loaded since.

    It takes no room on CUDA, and is not known but on Linux: 0.
    """
    return 0 if device.type == "cuda" else max(0, (_status("VmRSS") or 0) - AT_IMPORT)


def high_water_bytes() -> int:
    """The most memory that the process has held so far; 0 where the system does not tell."""
    found = _status("VmHWM")  # getrusage would start from what the process that started this one held
    if found is not None:
        return found
    try:
        import resource
    except ImportError:  # Windows has no such module
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _status(field: str) -> int | None:
    """Bytes of a field of Linux's account of this process."""
    status = LINUX / "proc/self/status"
    if not status.is_file():
        return None
    found = re.search(rf"^{field}:\s+(\d+) kB$", status.read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else None


AT_IMPORT = high_water_bytes()


def free_memory_bytes(device: torch.device) -> int | None:
    """What can still be taken: of the GPU on CUDA, else of the machine and of the limits set to the process.

    On macOS it is all of the machine's memory, since it makes room as it is needed. None where nothing is known.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if sys.platform == "darwin":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    info = LINUX / "proc/meminfo"
    if info.is_file() and (found := re.search(r"^MemAvailable:\s+(\d+) kB$", info.read_text(), re.MULTILINE)):
        return min(int(found[1]) * 1024, *_rooms())
    return None


def _rooms() -> Iterator[int]:
    """What the control groups of the process, and those that they are in, still allow; at least one number."""
    yield sys.maxsize
    groups = LINUX / "proc/self/cgroup"
    for line in groups.read_text().splitlines() if groups.is_file() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = LINUX / "sys/fs/cgroup" / ("memory" if controllers else "")
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):  # in a container the path may be the one outside, and is not there
            if folder.is_relative_to(top):
                yield from _room(folder, *STAT["v1" if controllers else "v2"])


def _room(folder: Path, limit: str, usage: str, reclaimable: str) -> Iterator[int]:
    """Limit minus usage; files that were read, and can be read again, do not count as used."""
    try:
        most, used = (folder / limit).read_text().strip(), int((folder / usage).read_text())
        cached = re.search(rf"^{reclaimable} (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE)
    except OSError:  # no such group, or one without a limit
        return
    if most != "max":
        yield max(0, int(most) - used + (int(cached[1]) if cached else 0))


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


MAX_PARAMETERS = 200_000_000  # the products of a larger model are worth all threads
MAX_TOKENS = 512  # of the rows that are timed
MAX_SECONDS = 2.0  # where a step takes longer than this, or the rounds together do, no further round follows
ROUNDS = 5


def choose_threads(model: nn.Module, dataset: Sequence[Any], config: TrainConfig) -> int | None:
    """Set the number of threads to one or to all, whichever runs a forward and backward pass of a few rows faster.

    Weights, gradients and random states stay as they are.

    Returns:
        The number of threads, or None where nothing is measured: with OMP_NUM_THREADS set, with one thread, on another
        device, or for a large model.

    Raises:
        DataError, TrainingError: the rows or the model cannot be trained, as in `train`.
    """
    threads, device = torch.get_num_threads(), next(model.parameters()).device
    is_small = sum(p.numel() for p in model.parameters()) <= MAX_PARAMETERS
    if "OMP_NUM_THREADS" in os.environ or threads == 1 or device.type != "cpu" or not is_small:
        return None
    objective, was_training = TokenLoss(config), model.training
    objective.check(model, dataset, ())
    batch = objective.batch(_few_rows(dataset, objective.lengths(dataset), config), device)

    def step() -> None:
        loss, _ = objective(model, batch)
        loss.backward()

    model.train()
    set_dropout_step(model, config.seed, 0)
    try:
        found = fastest_thread_count(step, (1, threads))
    finally:
        set_dropout_step(model, None)
        model.train(was_training)
        model.zero_grad()
    torch.set_num_threads(found)
    return found


def _few_rows(dataset: Sequence[Any], lengths: Sequence[int], config: TrainConfig) -> list[Any]:
    """The rows of the first micro-batch, shortest first, up to `MAX_TOKENS`; at least one."""
    chosen, total = list[Any](), 0
    for row in sorted(plan_steps(lengths, config)[0][0], key=lambda row: lengths[row]):
        total += lengths[row]
        if chosen and total > MAX_TOKENS:
            break
        chosen.append(dataset[row])
    return chosen


def fastest_thread_count(step: Callable[[], None], choices: Sequence[int]) -> int:
    """Return the number of threads with the smallest median time of a step; the last one where a step takes long."""

    def seconds(threads: int) -> float:
        torch.set_num_threads(threads)
        began = perf_counter()
        step()
        return perf_counter() - began

    first = seconds(choices[-1])  # not counted: it also prepares the kernels
    if first > MAX_SECONDS:
        return choices[-1]
    times: dict[int, list[float]] = {threads: [] for threads in choices}
    for _ in range(ROUNDS):
        for threads in choices:
            times[threads].append(seconds(threads))
        if sum(map(sum, times.values())) > MAX_SECONDS:
            break
    return min(choices, key=lambda threads: statistics.median(times[threads]))
