"""Training: the loss, the learning-rate schedule and the optimizer step.

A step's loss is the sum of its tokens' losses over their number; a batch cut into parts has the same gradient:

    L = 1/n Σ_t -log p(token t | before),    n = Σ over micro-batches of their labelled tokens

A run is a loop over steps; `minilora.runs` puts evaluation, checkpoints and logs around it:

    for step, rows in enumerate(steps):
        optimizer.param_groups[0]["lr"] = learning_rate(step, len(steps), peak=2e-4, warmup=10)
        train_step(model, optimizer, [collate(rows, device)])

    [AdamW]  Loshchilov & Hutter 2017, Decoupled Weight Decay Regularization
    [SGDR]   Loshchilov & Hutter 2016, SGDR: Stochastic Gradient Descent with Warm Restarts
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from minilora.data import Batch
from minilora.errors import DataError
from minilora.llama import Checkpointing, cross_entropy

Loss = Callable[[Any, Any], tuple[Tensor, int]]  # (model, batch) -> the sum of losses, and their number
NORM_CHUNK = 65536  # numbers of a partial norm: one float32 sum of 134 million squares is off by 3 %


def token_loss(model: Any, batch: Batch, checkpointing: Checkpointing = "none") -> tuple[Tensor, int]:
    """Sum -log p(token | before) over the labelled tokens of a batch; return it with their number."""
    hidden = model.model(batch.tokens, batch.lengths, checkpointing=checkpointing)
    hidden = hidden.index_select(0, batch.places)  # the head sees only what predicts a label
    return cross_entropy(hidden, batch.labels, model.get_output_embeddings()), len(batch.labels)


def learning_rate(step: int, total: int, peak: float, warmup: int, scheduler: str = "cosine") -> float:
    """Compute the learning rate of step 0 ≤ step < total: linear warm-up to the peak, then decay  [SGDR eq. 5].

    The first step has peak/warmup. The decay would reach 0 at step = total, so no step has a rate of 0.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    factor = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
    return peak * factor[scheduler]


def adamw(groups: Iterable[Any]) -> torch.optim.AdamW:
    """Build the fused AdamW over parameters, or groups of them, without weight decay  [AdamW alg. 2]."""
    return torch.optim.AdamW(groups, weight_decay=0.0, fused=True)


class Step(NamedTuple):  # reading its tensors waits for the device
    loss: Tensor
    grad_norm: Tensor  # before clipping
    labelled: int  # losses that were counted


def train_step(
    model: nn.Module,
    optimizer: Optimizer,
    batches: Iterable[Any],
    loss: Loss = token_loss,
    max_grad_norm: float = 1.0,
    reduce: Callable[[list[Tensor], int], int] = lambda tensors, count: count,
) -> Step:
    """Make one optimizer step on the mean loss of some micro-batches.

    The gradient is clipped to `max_grad_norm`, unless that is 0. If it is not finite, the weights stay unchanged. Where
    processes share a step, `reduce` sums tensors over them in place, and returns the sum of their counts.
    """
    model.train()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)  # not None, where the loss does not use a parameter
    total, count = torch.zeros((), device=parameters[0].device), 0
    for batch in batches:
        part, number = loss(model, batch)
        part.backward()  # adds to the gradients
        total, count = total + part.detach().sum(), count + number
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    count = reduce([*gradients, total], count)
    if not count:
        raise DataError("the loss counts nothing in the rows of a step")
    torch._foreach_div_([*gradients, total], count)
    norm = total_norm(gradients)
    is_finite = total.isfinite() & norm.isfinite()
    if max_grad_norm:
        torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm.where(is_finite, 0))  # 0: not at all
    if optimizer.defaults.get("fused") and norm.device.type != "mps":  # its kernel skips the step, without waiting
        optimizer.found_inf = (~is_finite).float()  # type: ignore[attr-defined]
        optimizer.step()
    elif is_finite:
        optimizer.step()
    return Step(total, norm, count)


def total_norm(tensors: Sequence[Tensor], p: float = 2.0) -> Tensor:
    """Compute the norm of all numbers of some tensors, of which all or none are sharded."""
    split = [[t] if hasattr(t, "full_tensor") else t.flatten().split(NORM_CHUNK) for t in tensors]
    norm: Any = torch.nn.utils.get_total_norm([part for parts in split for part in parts], p)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
