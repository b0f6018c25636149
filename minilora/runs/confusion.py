"""What was taken for what, and what follows from it.

    n_ij    how many of class i were taken for class j     n = Σ_ij n_ij     n_i = Σ_j n_ij     m_j = Σ_i n_ij

    accuracy = Σ_i n_ii / n                precision_i = n_ii / m_i     recall_i = n_ii / n_i
    F1_i = 2 n_ii / (n_i + m_i)            the harmonic mean of the two
    macro F1 = mean of F1_i                over the classes with n_i + m_i > 0
    weighted F1 = Σ_i n_i F1_i / n

A quotient whose denominator is 0 counts as 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class ClassScore:
    """One class: precision, recall, F1, and n_i, how many were of it."""

    precision: float
    recall: float
    f1: float
    count: int


@dataclass(frozen=True)
class Confusion:
    """`counts[i][j]` is n_ij; the classes are those of `labels`."""

    labels: tuple[str, ...]
    counts: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, pairs: Iterable[tuple[int, int]], labels: Sequence[str]) -> Confusion:
        """Count pairs of a class and what it was taken for."""
        counted, classes = Counter(pairs), range(len(labels))
        return cls(tuple(labels), tuple(tuple(counted[i, j] for j in classes) for i in classes))

    @property
    def accuracy(self) -> float:
        right = sum(row[i] for i, row in enumerate(self.counts))
        return _ratio(right, sum(map(sum, self.counts)))

    @property
    def macro_f1(self) -> float:
        seen = [score.f1 for score, taken in zip(self.classes, self._taken, strict=True) if score.count or taken]
        return _ratio(sum(seen), len(seen))

    @property
    def weighted_f1(self) -> float:
        return _ratio(sum(score.count * score.f1 for score in self.classes), sum(map(sum, self.counts)))

    @property
    def classes(self) -> list[ClassScore]:
        """The scores of each class, in the order of the labels."""
        scores = []
        for i, (row, taken) in enumerate(zip(self.counts, self._taken, strict=True)):
            right, count = row[i], sum(row)
            f1 = _ratio(2 * right, count + taken)
            scores.append(ClassScore(_ratio(right, taken), _ratio(right, count), f1, count))
        return scores

    @property
    def _taken(self) -> list[int]:
        return [sum(column) for column in zip(*self.counts, strict=True)]

    def record(self) -> dict[str, Any]:
        """All of it, for JSON."""
        classes = zip(self.labels, self.classes, strict=True)
        return {
            "accuracy": self.accuracy,
            "macro_f1": self.macro_f1,
            "weighted_f1": self.weighted_f1,
            "classes": {label: asdict(score) for label, score in classes},
            "confusion": [list(row) for row in self.counts],
        }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
