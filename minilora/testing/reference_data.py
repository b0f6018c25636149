"""Oracles of the loss over labelled tokens and of gradient accumulation, in float64, by loops, with numpy alone.

    B  rows    T  positions    V  vocabulary    D  width    N  labels that are predicted

The logits at position t predict the label at t + 1, so the last position and the first label never count.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
IGNORED = -100


def masked_loss(logits: Array, labels: Array) -> float:
    """L = 1/N Σ -log p(label at t + 1 | logits at t), over the labels that are not -100; nan if there are none.

    Shapes: logits (B, T, V), labels (B, T) -> ()
    """
    losses = []
    for row, t, label in predicted(labels):
        scores = np.asarray(logits[row, t], dtype=np.float64)
        most = scores.max()
        losses.append(math.log(math.fsum(math.exp(score - most) for score in scores)) + most - scores[label])
    return math.fsum(losses) / len(losses) if losses else math.nan


def masked_loss_gradient(logits: Array, labels: Array) -> Array:
    """dL/dlogits = (softmax - onehot)/N where a label is predicted, and 0 elsewhere.

    Shapes: logits (B, T, V), labels (B, T) -> (B, T, V)
    """
    places = list(predicted(labels))
    gradient = np.zeros(np.shape(logits))
    for row, t, label in places:
        scores = np.asarray(logits[row, t], dtype=np.float64)
        shares = np.exp(scores - scores.max())
        gradient[row, t] = shares / math.fsum(shares)
        gradient[row, t, label] -= 1
    return gradient / max(1, len(places))


def accumulated_gradient(weight: Array, micro_batches: Sequence[tuple[Array, Array]]) -> Array:
    """dL/dW of one step: L = 1/N Σ of the losses of all micro-batches, logits = x Wᵀ, N the number of their labels.

    Shapes: weight (V, D), micro_batches of x (B, T, D) and labels (B, T) -> (V, D)
    """
    weight = np.asarray(weight, dtype=np.float64)
    total, count = np.zeros(weight.shape), 0
    for x, labels in micro_batches:
        for row, t, label in predicted(labels):
            scores = np.array([math.fsum(weights * x[row, t]) for weights in weight])
            shares = np.exp(scores - scores.max())
            shares /= math.fsum(shares)
            for token, share in enumerate(shares):
                total[token] += (share - (token == label)) * x[row, t]
            count += 1
    return total / max(1, count)


def predicted(labels: Array) -> Iterator[tuple[int, int, int]]:
    """Yield row, position t and label of all labels at t + 1 that are not -100."""
    for row, own in enumerate(np.asarray(labels).tolist()):
        for t in range(len(own) - 1):
            if own[t + 1] != IGNORED:
                yield row, t, own[t + 1]
