"""What a solution of exercise 2 must do."""

from __future__ import annotations

import math
from types import ModuleType

import torch

from minilora.testing.reference import cross_entropy

ROWS = [[-100, -100, 3, 1, 0], [-100, 2, -100], [4, 4, -100, -100, -100, 0]]  # the first token is never predicted
LOGITS = [
    3 * torch.randn(len(labels), 5, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
    for i, labels in enumerate(ROWS)
]


def expected(number: int) -> list[float]:
    """-log p of each label of a row, by loops."""
    scores, labels = LOGITS[number][:-1], ROWS[number][1:]
    return [
        cross_entropy(scores[i : i + 1].numpy(), torch.tensor([label]).numpy())
        for i, label in enumerate(labels)
        if label != -100
    ]


def check_steps(answer: ModuleType) -> None:
    """`steps` counts the smaller last batch of each epoch."""
    for rows, batch_size, epochs in ((16, 4, 1), (374, 8, 3), (5, 4, 2)):
        found, right = answer.steps(rows, batch_size, epochs), epochs * len(range(0, rows, batch_size))
        case = f"{rows} rows, {batch_size} in a batch, {epochs} epochs"
        assert found == right, f"{case}: {found} steps, {'more' if found > right else 'fewer'} than the run makes"


def check_token_losses(answer: ModuleType) -> None:
    """`token_losses` equals the loops of `minilora.testing.reference`, and does not count the first token."""
    for number, labels in enumerate(ROWS):
        found, right = answer.token_losses(LOGITS[number], labels), expected(number)
        case = f"labels {labels}"
        assert len(found) == len(right), f"{case}: {len(found)} losses, but {len(right)} labels are predicted"
        wrong = [(i, a, b) for i, (a, b) in enumerate(zip(found, right, strict=True)) if not math.isclose(a, b)]
        for i, a, b in wrong[:1]:
            raise AssertionError(f"{case}: loss {i} is {float(a):.4f}; after what it has read, the model gives {b:.4f}")


def check_mean_loss(answer: ModuleType) -> None:
    """`mean_loss` is one mean over the labels of all rows."""
    each = [expected(number) for number in range(len(ROWS))]
    for count in (1, len(ROWS)):
        found = answer.mean_loss(list(zip(LOGITS, ROWS, strict=True))[:count])
        losses = [loss for row in each[:count] for loss in row]
        right = math.fsum(losses) / len(losses)
        assert isinstance(found, float), f"{count} rows: mean_loss returns {type(found).__name__}, need a Python float"
        of_rows = math.fsum(math.fsum(row) / len(row) for row in each[:count]) / count
        assert count == 1 or not math.isclose(found, of_rows), (
            f"{count} rows: in this mean a label of a row with few labels weighs more than one of a row with many"
        )
        assert math.isclose(found, right), f"{count} rows: the loss is {found:.6f}, and not {right:.6f}"


def check_best_step(answer: ModuleType) -> None:
    """`best_step` finds the lowest loss, and of equal ones the first."""
    for losses in ({20: 3.6, 40: 3.4, 60: 3.5}, {20: 3.2, 40: 3.4}, {5: 2.0, 10: 1.5, 15: 1.5}, {40: 2.0, 20: 2.0}):
        found, right = answer.best_step(losses), min(losses, key=lambda step: (losses[step], step))
        assert found == right, (
            f"losses {losses}: the adapter of step {found} is kept, and step {right} has a better claim"
        )
