"""Kernels for CUDA: a batch is copied while the processor goes on, and a step ends without waiting for the device."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

from minilora import data, training
from minilora.data import Batch, Example
from minilora.definition import kernel
from minilora.training import Step, parameters_of


@kernel(of=data.collate)
def collate(examples: Iterable[Example], device: torch.device) -> Batch:
    """Build the tensors in pinned memory, from where they are copied asynchronously."""
    if device.type != "cuda":
        return data.collate.function(examples, device)
    batch = data.collate.function(examples, torch.device("cpu"))
    tensors = (batch.tokens, batch.label_positions, batch.labels)
    tokens, positions, labels = (tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors)
    return Batch(tokens, batch.lengths, positions, labels)


@kernel(of=training.update)
def update(optimizer: Optimizer, total: Tensor, count: int, max_grad_norm: float) -> Step:
    """Let the fused optimizer find out on the device whether to step: it reads `found_inf`."""
    if not count or not optimizer.defaults.get("fused") or total.device.type == "mps":  # where it is not read
        return training.update.function(optimizer, total, count, max_grad_norm)
    parameters = parameters_of(optimizer)
    gradients = [parameter.grad for parameter in parameters]
    torch._foreach_div_(gradients, count)
    mean = total / count
    norm = training.total_norm(gradients)
    is_finite = mean.isfinite() & norm.isfinite()
    if max_grad_norm:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm.where(is_finite, 0))  # 0: not at all
    optimizer.found_inf = (~is_finite).float()  # type: ignore[attr-defined]
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf  # type: ignore[attr-defined]  # or later steps would read it
    return Step(mean, norm)
