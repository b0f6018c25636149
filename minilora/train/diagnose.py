"""Looking at a run from outside: memory, and where a number stopped being finite."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory so far: of the GPU's allocator on CUDA, of the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows has no such module
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@torch.no_grad()
def first_bad_module(model: nn.Module, compute: Callable[[], Any]) -> str:
    """Run `compute` once more and name the first module whose output is not finite; else the first such gradient."""
    bad: list[str] = []

    def watch(path: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.is_floating_point() and not output.isfinite().all():
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
