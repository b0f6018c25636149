"""A measurement is made in a process that has done nothing else: its time, and the memory that it took."""

import importlib
import multiprocessing
import re
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # as any optimizer does: 70 MB that are nobody's own

GEMM_SIDES = (1024, 2048, 4096)


@dataclass(frozen=True)
class Measurement:
    """What one process measured: seconds of each repetition after the warm-up, and how much each one did."""

    seconds: list[float]
    amounts: list[float]  # tokens
    peak_bytes: int
    checks: dict[str, float] = field(default_factory=dict)  # what must be the same for everyone who does this work

    @property
    def rate(self) -> float:
        """Amount a second."""
        return sum(self.amounts) / sum(self.seconds)


@dataclass(frozen=True)
class Round:
    """A turn of every side at one work. Of training: FLOP of the measured steps, and what the machine can do."""

    work: str
    sides: dict[str, Measurement]
    flop: float = 0.0
    gemm_peak: float = 0.0  # FLOP a second
    forecast_bytes: int = 0  # of our peak


class Clock:
    """The times between calls, once the device has done what was asked of it."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: list[float] = []
        self.start()

    def start(self) -> None:
        wait(self.device)
        self.last = time.perf_counter()

    def stop(self) -> None:
        """The end of one repetition, and the start of the next."""
        wait(self.device)
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now


class Peak:
    """The most memory that was taken since now: made after the imports, before a model is loaded."""

    def __init__(self, device: str):
        self.device = torch.device(device)
        self.before = high_water_bytes()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def read(self) -> int:
        """Bytes: of tensors on CUDA, of the process elsewhere."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return high_water_bytes() - self.before


def first_and_last(losses: Sequence[float], norm: float) -> dict[str, float]:
    """What must be the same for everyone who trains: losses, and the norm of the first gradient."""
    return {"loss": losses[0], "gradient norm": norm, "last loss": losses[-1]}


def wait(device: torch.device) -> None:
    """Until the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def high_water_bytes() -> int:
    """The most memory that this process has held so far."""
    status = Path("/proc/self/status")  # getrusage would start from what the process that started this one held
    if status.is_file() and (found := re.search(r"^VmHWM:\s+(\d+) kB$", status.read_text(), re.MULTILINE)):
        return int(found[1]) * 1024
    import resource  # Windows has no such module

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def in_fresh_process(function: Callable[..., Any], *args: Any) -> Any:
    """What function(*args) returns in a process that has done nothing else, with as many threads as this one."""
    context = multiprocessing.get_context("spawn")
    threads = (torch.get_num_threads(),)
    with ProcessPoolExecutor(1, context, initializer=torch.set_num_threads, initargs=threads) as pool:
        return pool.submit(function, *args).result()


def called(module: str, name: str, *args: Any) -> Any:
    """What a function of a module returns that is imported here and now: in a fresh process, there alone."""
    return getattr(importlib.import_module(module), name)(*args)


def gemm_peak(dtype: str, device: torch.device) -> float:
    """The most FLOP a second of a product of square matrices, several sizes and repetitions of it."""
    best = 0.0
    for side in GEMM_SIDES:
        a, b = (torch.randn(side, side, device=device).to(getattr(torch, dtype)) for _ in range(2))
        a @ b
        clock = Clock(device)
        for _ in range(5):
            a @ b
            clock.stop()
        best = max(best, 2 * side**3 / min(clock.seconds))
    return best
