"""Looking at a run from outside: memory, and where a number stopped being finite."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

LINUX = Path("/")  # where /proc and /sys are
STAT = {"v2": ("memory.max", "memory.current", "inactive_file")}
STAT["v1"] = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


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


@torch.no_grad()
def first_bad_module(model: nn.Module, compute: Callable[[], Any]) -> str:
    """Run `compute` once more and name the first module whose output is not finite; else the first such gradient."""
    bad: list[str] = []

    def watch(path: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            tensors = [each for each in tree_leaves(output) if isinstance(each, Tensor) and each.is_floating_point()]
            if not all(bool(tensor.isfinite().all()) for tensor in tensors):
                bad.append(path)

        return hook

    handles = [module.register_forward_hook(watch(path)) for path, module in model.named_modules()]
    try:
        compute()
    finally:
        for handle in handles:
            handle.remove()
    if bad:
        return f"output of {bad[0]}"
    gradients = ((name, p.grad) for name, p in model.named_parameters() if p.grad is not None)
    return next((f"gradient of {name}" for name, grad in gradients if not grad.isfinite().all()), "the loss itself")
