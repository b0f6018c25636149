"""Training: the loss, the learning-rate schedule and the optimizer step.

A step's loss is the mean of its tokens' losses; a batch cut into parts has the same gradient:

    L = 1/n Σ_t -log p(token t | before),    n = Σ over micro-batches of their labelled tokens

A run is a loop over steps; `minilora.runs` adds evaluation, checkpoints and logs:

    for step, rows in enumerate(steps):
        optimizer.param_groups[0]["lr"] = learning_rate(step, len(steps), peak=2e-4, warmup=10)
        train_step(model, optimizer, [collate(rows, device)])

    [AdamW]  Loshchilov & Hutter 2017, Decoupled Weight Decay Regularization
    [SGDR]   Loshchilov & Hutter 2016, SGDR: Stochastic Gradient Descent with Warm Restarts
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from minilora.data import Batch
from minilora.errors import DataError
from minilora.llama import Checkpointing, Documents, cross_entropy

Loss = Callable[[Any, Any], tuple[Tensor, int]]  # (model, batch) -> sum of losses, their number
NORM_CHUNK = 65536  # a long float32 sum swallows small squares: of 134 million, it is off by 3 %


def token_loss(
    model: Any, batch: Batch, checkpointing: Checkpointing = "none"
) -> tuple[Tensor, int]:
    """Sum -log p(token | before) over the labels of a batch; return it with their number."""
    hidden = model.model(batch.tokens, Documents(batch.lengths), checkpointing)  # (N, D), no head
    hidden = hidden.index_select(0, batch.label_positions)  # the head sees what predicts a label
    return cross_entropy(hidden, batch.labels, model.get_output_embeddings()), len(batch.labels)


def learning_rate(
    step: int, total: int, peak: float, warmup: int, scheduler: str = "cosine"
) -> float:
    """Compute the learning rate of a step: linear warm-up to the peak, then decay  [SGDR eq. 5].

    The first step, 0, has peak/warmup. The decay would reach 0 at step = total, so no rate is 0.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    factors = {
        "constant": 1.0,
        "linear": 1 - progress,
        "cosine": (1 + math.cos(math.pi * progress)) / 2,
    }
    return peak * factors[scheduler]


def adamw(groups: Iterable[Any]) -> torch.optim.AdamW:
    """Build the fused AdamW over parameters, or groups of them, without decay  [AdamW alg. 2]."""
    return torch.optim.AdamW(groups, weight_decay=0.0, fused=True)


class Step(NamedTuple):
    loss: float
    grad_norm: float  # before clipping


def train_step(
    model: nn.Module,
    optimizer: Optimizer,
    batches: Iterable[Any],
    loss: Loss = token_loss,
    max_grad_norm: float = 1.0,
) -> Step:
    """Make one optimizer step on the mean loss of micro-batches; `ml.train` makes a run."""
    total, count = accumulate(model, optimizer, batches, loss)
    return update(optimizer, total, count, max_grad_norm)


def accumulate(
    model: nn.Module, optimizer: Optimizer, batches: Iterable[Any], loss: Loss
) -> tuple[Tensor, int]:
    """Return the sum and number of micro-batches' losses; the gradients add up in `grad`."""
    model.train()
    parameters = parameters_of(optimizer)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)  # not None, where the loss does not use it
    total = torch.zeros((), device=parameters[0].device)
    count = 0
    for batch in batches:
        part, number = loss(model, batch)
        part.backward()
        total = total + part.detach().sum()
        count += number
    return total, count


def update(optimizer: Optimizer, total: Tensor, count: int, max_grad_norm: float) -> Step:
    """Divide the sum of losses and its gradients by their number, clip the gradients, and step.

    g ← g · min(1, max_grad_norm / ‖g‖), ‖g‖ over all parameters; g stays as it is if
    `max_grad_norm` is 0. If the loss or the norm is not finite, the parameters stay unchanged; if
    there are no losses, this is a DataError.
    """
    if not count:
        problem = "no token of a step has a label (the loss returned the count 0)"
        raise DataError(f"{problem}; does max_length cut the answers off?")
    parameters = parameters_of(optimizer)
    for parameter in parameters:
        parameter.grad /= count
    chunks = [part for p in parameters for part in p.grad.flatten().split(NORM_CHUNK)]
    norm = torch.nn.utils.get_total_norm(chunks)  # of all numbers, from the norms of chunks
    step = Step(*torch.stack((total / count, norm)).tolist())  # waits for the device, once
    if math.isfinite(step.loss) and math.isfinite(step.grad_norm):
        if max_grad_norm:
            torch.nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm)
        optimizer.step()
    return step


def parameters_of(optimizer: Optimizer) -> list[Any]:
    """Return the parameters of all groups."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
