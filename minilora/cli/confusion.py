"""A classifier's scores as a table: how well each class was told, and what it was taken for."""

from __future__ import annotations

from collections.abc import Sequence

from minilora.cli.columns import cells, fit
from minilora.runs.confusion import Confusion

LABEL_WIDTH = 24
SCORES = ("precision", "recall", "F1", "count")
MISTAKES = 10  # that are listed where their table would be too wide


def confusion_table(confusion: Confusion, width: int) -> str:
    """A line for each class: how often it was taken for each, by their numbers, and its scores.

    Where that is wider than `width`, the scores alone, and the most frequent mistakes below.
    """
    names = [f"{i} {fit(label, LABEL_WIDTH)}" for i, label in enumerate(confusion.labels)]
    scores = [
        [f"{score.precision:.3f}", f"{score.recall:.3f}", f"{score.f1:.3f}", str(score.count)]
        for score in confusion.classes
    ]
    head = ["was; taken for", *map(str, range(len(names)))]
    lines = zip(names, confusion.counts, scores, strict=True)
    table = _aligned([[*head, *SCORES], *([name, *map(str, row), *told] for name, row, told in lines)])
    if max(map(cells, table)) <= width:
        return "\n".join(table)
    table = _aligned([["class", *SCORES], *([name, *told] for name, told in zip(names, scores, strict=True))])
    mistakes = [(-n, i, j) for i, row in enumerate(confusion.counts) for j, n in enumerate(row) if n and i != j]
    return "\n".join(
        [*table, *(f"{names[i]} was taken for {names[j]}: {-n}" for n, i, j in sorted(mistakes)[:MISTAKES])]
    )


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The first column begins, the others end at one place."""
    widths = [max(map(cells, column)) for column in zip(*rows, strict=True)]
    padded = [[" " * (width - cells(text)) for width, text in zip(widths, row, strict=True)] for row in rows]
    return [
        "  ".join([row[0] + space[0], *(left + text for left, text in zip(space[1:], row[1:], strict=True))])
        for row, space in zip(rows, padded, strict=True)
    ]
