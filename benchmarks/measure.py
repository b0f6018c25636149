"""What the benchmarks share: where they ran, times in alternation, the memory of a fresh process, and a table."""

from __future__ import annotations

import importlib.metadata
import multiprocessing
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")  # of a processor, that decide how fast bfloat16 is on it
PACKAGES = ("minilora", "torch", "bitsandbytes", "transformers", "peft")


@dataclass(frozen=True)
class Bound:
    """What a number is required to be."""

    word: Literal["at least", "at most"]
    limit: float

    def is_met(self, value: float) -> bool:
        return value >= self.limit if self.word == "at least" else value <= self.limit

    def __str__(self) -> str:
        return f"{self.word} {self.limit:g}"


def surroundings(device: torch.device) -> str:
    """Machine and versions, in two lines."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    named = re.search(r"^model name\s*: (.+)", text, flags=re.MULTILINE)
    words = set(text.split())
    processor = [named[1] if named else platform.processor() or platform.machine(), *(f for f in FLAGS if f in words)]
    cores = f"{torch.get_num_threads()} of {os.cpu_count()} threads"
    machine = f"{' '.join(processor)}, {cores}, {platform.system()}"
    if device.type == "cuda":
        machine = f"{torch.cuda.get_device_name(device)}; {machine}"
    return f"{machine}\n{', '.join(f'{name} {_version(name)}' for name in PACKAGES)}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def alternate(runs: int, device: torch.device, *works: Callable[[], Any]) -> list[list[float]]:
    """The seconds that each work took in each of `runs` rounds.

    A round does every work once, so that a slow moment of the machine meets all of them. A round before, in which
    memory is allocated and kernels are chosen, does not count.
    """
    rounds = [[_seconds(work, device) for work in works] for _ in range(runs + 1)]
    return [list(times) for times in zip(*rounds[1:], strict=True)]


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratio_row(what: str, first: Sequence[float], second: Sequence[float], bound: Bound | None = None) -> list[str]:
    """A row of RATIOS: the medians of two works' seconds, and median and range of the rounds' own ratios."""
    ratios = [a / b for a, b in zip(first, second, strict=True)]
    middle = statistics.median(ratios)
    seconds = [_amount(statistics.median(times)) for times in (first, second)]
    return [what, *seconds, f"{middle:.2f}", f"{min(ratios):.2f} to {max(ratios):.2f}", *verdict(middle, bound)]


def _amount(seconds: float) -> str:
    """Seconds, or milliseconds where those are few."""
    return f"{seconds:.3f} s" if seconds >= 0.1 else f"{1000 * seconds:.2f} ms"


RATIOS = ("first / second", "first", "second", "ratio", "lowest to highest", "required", "met")


def verdict(value: float, bound: Bound | None) -> tuple[str, str]:
    """What is required of a value, and whether it is so."""
    return ("", "") if bound is None else (str(bound), "yes" if bound.is_met(value) else "NO")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def in_fresh_process(function: Callable[..., Any], *args: Any) -> Any:
    """What function(*args) returns in a process that has done nothing else, with as many threads as this one."""
    context = multiprocessing.get_context("spawn")
    threads = (torch.get_num_threads(),)
    with ProcessPoolExecutor(1, context, initializer=torch.set_num_threads, initargs=threads) as pool:
        return pool.submit(function, *args).result()
