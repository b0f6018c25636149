"""Names that differ in numbers alone, shown once: `model.layers.{0-29}.mlp.up_proj.weight`."""

from __future__ import annotations

import itertools
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

NUMBER = re.compile(r"(?<![^./])(0|[1-9][0-9]{0,8})(?![^./])")  # a whole part of a name, written as Python writes it
Numbers = tuple[tuple[int, ...], ...]  # for each place of a name, the numbers that stand there


@dataclass(frozen=True)
class Fold:
    """Names with `numbers[i]` between `texts[i]` and `texts[i + 1]`, in every combination."""

    texts: tuple[str, ...]
    numbers: Numbers

    def names(self) -> list[str]:
        """Every name that it stands for."""
        return [self._between(choice) for choice in itertools.product(*self.numbers)]

    def __str__(self) -> str:
        return self._between([f"{{{_ranges(n)}}}" if len(n) > 1 else n[0] for n in self.numbers])

    def _between(self, values: Sequence[object]) -> str:
        return "".join(f"{text}{value}" for text, value in itertools.zip_longest(self.texts, values, fillvalue=""))


def fold(kinds: Mapping[str, Hashable]) -> list[Fold]:
    """The names in as few folds as their numbers allow; names of different kinds are never in one fold.

    >>> [str(each) for each in fold({"a.0.w": "x", "a.1.w": "x", "a.2.w": "y", "b": "x"})]
    ['a.{0-1}.w', 'a.2.w', 'b']
    """
    groups: dict[tuple[Hashable, tuple[str, ...]], list[Numbers]] = {}
    for name in sorted(kinds, key=_natural):
        parts = NUMBER.split(name)
        numbers = tuple((int(part),) for part in parts[1::2])
        groups.setdefault((kinds[name], tuple(parts[::2])), []).append(numbers)
    return [Fold(texts, numbers) for (_, texts), rows in groups.items() for numbers in _products(rows)]


def _products(rows: list[Numbers]) -> list[Numbers]:
    """Rows that are equal but for one place become one, the last place first."""
    for place in reversed(range(len(rows[0]))):
        merged: dict[Numbers, tuple[int, ...]] = {}
        for row in rows:
            others = row[:place] + row[place + 1 :]
            merged[others] = merged.get(others, ()) + row[place]
        rows = [(*others[:place], tuple(sorted(here)), *others[place:]) for others, here in merged.items()]
    return rows


def _ranges(numbers: Sequence[int]) -> str:
    """0, 1, 2, 5 as "0-2,5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _natural(name: str) -> tuple[int | str, ...]:
    return tuple(int(part) if i % 2 else part for i, part in enumerate(NUMBER.split(name)))
