"""What a solution of exercise 2 must do."""

from __future__ import annotations

import math
from types import ModuleType

import torch

from minilora.testing.reference import cross_entropy

ROWS = [[-100, -100, 3, 1, 0], [-100, 2, -100], [4, 4, -100, -100, -100, 0]]  # the first token is never predicted


def check(answer: ModuleType) -> None:
    """`mean_loss` equals the loops of `minilora.testing.reference`, for one row and for rows of unequal length."""
    generator = torch.Generator().manual_seed(0)
    logits = [3 * torch.randn(len(labels), 5, generator=generator, dtype=torch.float64) for labels in ROWS]
    for count in (1, len(ROWS)):
        rows = list(zip(logits, ROWS, strict=True))[:count]
        losses = [cross_entropy(scores[:-1].numpy(), torch.tensor(labels[1:]).numpy()) for scores, labels in rows]
        expected = math.fsum(losses) / sum(label != -100 for _, labels in rows for label in labels[1:])
        found = answer.mean_loss(rows)
        kind = type(found).__name__
        assert isinstance(found, float), f"{count} rows: mean_loss returns {kind}, need a Python float (`.item()`)"
        assert math.isclose(found, expected, rel_tol=1e-9), (
            f"{count} rows: the loss is {found:.6f}, not {expected:.6f}. "
            "The logits at a position speak of the next token, and only labelled tokens count, all rows together"
        )
