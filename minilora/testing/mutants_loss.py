"""Planted mistakes in masked losses and in accumulated gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from minilora.testing.mutants_lora import Plant, Table, gradient_times, wrapped

IGNORE = -100


# --- the masked loss ---


def count(labels: Tensor) -> Tensor:
    return (labels[:, 1:] != IGNORE).sum()


def column(labels: Tensor) -> Tensor:
    """Return a column of ignored labels."""
    return torch.full_like(labels[:, :1], IGNORE)


def times(factor: Callable[[Tensor], Any]) -> Plant:
    """Plant a loss that is `factor(labels)` times the correct one."""
    return wrapped(lambda loss, logits, labels: loss(logits, labels) * factor(labels))


def labelled(change: Callable[[Tensor], Tensor]) -> Plant:
    """Plant other labels."""
    return wrapped(lambda loss, logits, labels: loss(logits, change(labels)))


def not_shifted(loss: Any, logits: Tensor, labels: Tensor) -> Tensor:
    return loss(torch.cat([logits, logits[:, :1]], dim=1), torch.cat([column(labels), labels], dim=1))


def shifted_back(loss: Any, logits: Tensor, labels: Tensor) -> Tensor:
    return loss(logits.roll(-1, dims=1), torch.cat([column(labels), labels[:, :-1]], dim=1))


def mean_of_rows(loss: Any, logits: Tensor, labels: Tensor) -> Tensor:
    rows = [loss(logits[i : i + 1], labels[i : i + 1]) for i in range(len(labels)) if count(labels[i : i + 1])]
    return torch.stack(rows).mean()


def first_label_lost(labels: Tensor) -> Tensor:
    is_label = labels != IGNORE
    return labels.masked_fill(is_label & (is_label.cumsum(1) == 1), IGNORE)


def last_label_lost(labels: Tensor) -> Tensor:
    return first_label_lost(labels.flip(1)).flip(1)


def gradient_of_the_sum(loss: Any, logits: Tensor, labels: Tensor) -> Tensor:
    return gradient_times(count(labels), loss(logits, labels))


def without_the_maximum(loss: Any, logits: Tensor, labels: Tensor) -> Tensor:
    return loss(logits - logits.exp().sum(-1, keepdim=True).log(), labels)


def labels_overwritten(loss: Any, logits: Tensor, labels: Tensor) -> Tensor:
    result = loss(logits, labels)
    labels[labels == IGNORE] = 0
    return result


LOSS_MASKING: Table = [
    # the shift
    ("labels are not shifted", "", wrapped(not_shifted)),
    (
        "labels are shifted twice",
        "wdndev/tiny-llm-zh#10",
        labelled(lambda labels: torch.cat([labels[:, 1:], column(labels)], 1)),
    ),
    ("labels are shifted the wrong way", "", wrapped(shifted_back)),
    (
        "the end of a row predicts the start of the next",
        "",
        wrapped(lambda loss, logits, labels: loss(logits.flatten(0, 1)[None], labels.flatten()[None])),
    ),
    ("the first label of a row is not learned", "NVIDIA-NeMo/Speech#6409", labelled(first_label_lost)),
    ("the last label of a row is not learned", "", labelled(last_label_lost)),
    # which tokens
    ("masked tokens are learned as token 0", "", labelled(lambda labels: labels.clamp(min=0))),
    (
        "token 0 is taken for padding",
        "NVIDIA-NeMo/Megatron-Bridge#4660",
        labelled(lambda labels: labels.masked_fill(labels == 0, IGNORE)),
    ),
    # the denominator
    ("divided by all tokens, masked or not", "", times(lambda labels: count(labels) / labels[:, 1:].numel())),
    ("divided by labels counted before the shift", "", times(lambda labels: count(labels) / (labels != IGNORE).sum())),
    ("the mean of the rows' means", "", wrapped(mean_of_rows)),
    ("a sum instead of a mean", "", times(count)),
    (
        "a row without labels makes NaN",
        "",
        times(lambda labels: torch.stack([count(row[None]) / count(row[None]) for row in labels]).mean()),
    ),
    # the loss of a token
    ("softmax before the cross entropy", "", wrapped(lambda loss, logits, labels: loss(logits.softmax(-1), labels))),
    ("exp without subtracting the maximum", "", wrapped(without_the_maximum)),
    (
        "logits are rounded to bfloat16",
        "",
        wrapped(lambda loss, logits, labels: loss(logits.bfloat16().to(logits.dtype), labels)),
    ),
    ("the gradient is that of the sum", "", wrapped(gradient_of_the_sum)),
    ("the caller's labels are changed", "", wrapped(labels_overwritten)),
]


# --- accumulation ---

Batches = Sequence[tuple[Tensor, Tensor]]


def one_by_one(weight: Callable[[Tensor, Tensor], Any], total: Callable[[list[Any]], Any] = sum) -> Plant:
    """Plant a sum of the micro-batches' own gradients, each times `weight(x, labels)`, divided by the total of these.

    A micro-batch without labels is left out, so that this is not a second mistake.
    """

    def change(step: Any, W: Tensor, micro_batches: Batches) -> Tensor:
        batches = [batch for batch in micro_batches if count(batch[1])]
        weights = [weight(*batch) for batch in batches]
        gradients = [w * step(W, [batch]) for w, batch in zip(weights, batches, strict=True)]
        return torch.stack(gradients).sum(0) / total(weights)

    return wrapped(change)


def counted_before_the_shift(step: Any, W: Tensor, micro_batches: Batches) -> Tensor:
    all_labels = torch.cat([labels.flatten() for _, labels in micro_batches])
    return step(W, micro_batches) * sum(count(labels) for _, labels in micro_batches) / (all_labels != IGNORE).sum()


def nan_without_labels(step: Any, W: Tensor, micro_batches: Batches) -> Tensor:
    counts = torch.stack([count(labels) for _, labels in micro_batches])
    return step(W, micro_batches) * (counts / counts).mean()


def clipped_each(step: Any, W: Tensor, micro_batches: Batches) -> Tensor:
    batches = [batch for batch in micro_batches if count(batch[1])]
    sums = [count(batch[1]) * step(W, [batch]) for batch in batches]
    clipped = [gradient / gradient.norm().clamp(min=1) for gradient in sums]
    return torch.stack(clipped).sum(0) / sum(count(labels) for _, labels in batches)


def stepped_each(step: Any, W: Tensor, micro_batches: Batches) -> Tensor:
    weights, total, moved = [count(labels) for _, labels in micro_batches], torch.zeros_like(W), W.detach().clone()
    for weight, batch in zip(weights, micro_batches, strict=True):
        if weight:
            gradient = weight / sum(weights) * step(moved, [batch])
            total, moved = total + gradient, moved - 0.1 * gradient
    return total


def never_zeroed(step: Any) -> Any:
    kept: list[Tensor] = []

    def change(step: Any, W: Tensor, micro_batches: Batches) -> Tensor:
        kept.append(step(W, micro_batches))
        return torch.stack([gradient for gradient in kept if gradient.shape == W.shape]).sum(0)

    return wrapped(change)(step)


def weight_changed(step: Any, W: Tensor, micro_batches: Batches) -> Tensor:
    gradient = step(W, micro_batches)
    W.detach().sub_(0.1 * gradient)
    return gradient


ACCUMULATION: Table = [
    ("the mean of the micro-batches' means", "huggingface/transformers#34191", one_by_one(lambda x, labels: 1)),
    ("the sum of the micro-batches' means", "", one_by_one(lambda x, labels: 1, total=lambda weights: 1)),
    ("micro-batches are weighted by rows", "mosaicml/composer#3273", one_by_one(lambda x, labels: len(x))),
    ("micro-batches are weighted by tokens, masked or not", "", one_by_one(lambda x, labels: labels.numel())),
    ("labels are counted before the shift", "", wrapped(counted_before_the_shift)),
    (
        "all micro-batches are divided by the labels of the first",
        "",
        one_by_one(lambda x, labels: count(labels), total=lambda weights: weights[0] * len(weights)),
    ),
    ("only the last micro-batch counts", "", wrapped(lambda step, W, batches: step(W, batches[-1:]))),
    (
        "the last of an odd number of micro-batches is left out",
        "ml-explore/mlx-lm#1413",
        wrapped(lambda step, W, batches: step(W, batches[: len(batches) // 2 * 2] or batches)),
    ),
    ("a micro-batch without labels makes NaN", "", wrapped(nan_without_labels)),
    ("each micro-batch is clipped to norm 1", "", wrapped(clipped_each)),
    ("the weight is stepped after each micro-batch", "", wrapped(stepped_each)),
    ("the gradient of the call before is still there", "", never_zeroed),
    ("the caller's weight is changed", "", wrapped(weight_changed)),
]
