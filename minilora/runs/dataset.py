"""The examples of a data set, and counts of what became of its rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import overload

from minilora.data import IGNORE_INDEX, Example


@dataclass(repr=False, eq=False)
class Dataset(Sequence[Example]):
    """A sequence of tokenized rows, and counts of what was changed or dropped.

    `truncated` rows were cut to `max_length`; `unlabelled` rows had no label left and were dropped, as were rows that
    cannot be used: `bad` has an error message for each. `conversations` are rows rendered by a chat template;
    in `quoted` ones control tokens are encoded as plain text. `system` is the system prompt that all rows have.
    `cut` has the sources of rows that lost labels. A slice has the examples and `cut`, without the other counts.
    """

    examples: list[Example] = field(default_factory=list)
    cut: set[str] = field(default_factory=set)
    truncated: int = 0
    unlabelled: int = 0
    bad: list[str] = field(default_factory=list)
    conversations: int = 0
    quoted: int = 0
    system: str | None = None

    def __repr__(self) -> str:
        counts = f"{self.truncated} truncated, {self.unlabelled} unlabelled, {len(self.bad)} bad"
        return f"Dataset({len(self)} rows, {sum(len(example.tokens) for example in self)} tokens, {counts})"

    def __len__(self) -> int:
        return len(self.examples)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Dataset: ...
    def __getitem__(self, index: int | slice) -> Example | Dataset:
        if isinstance(index, slice):
            return Dataset(self.examples[index], self.cut)
        return self.examples[index]


def prompt_of(example: Example) -> list[int]:
    """Return the tokens before the first learned one."""
    return example.tokens[: next(i for i, label in enumerate(example.labels) if label != IGNORE_INDEX)]


def repeated_prompts(held_out: Dataset, training: Dataset) -> int:
    """Return the number of held-out rows that begin with the prompt of a training row, or equal one that has none."""
    counts = Counter(map(_prompt_or_row, held_out))
    repeated = {prompt for prompt in map(_prompt_or_row, training) if prompt in counts}
    return sum(counts[prompt] for prompt in repeated)


def _prompt_or_row(row: Example) -> tuple[int, ...]:
    """Return the prompt, or the whole row if at most one token, as BOS is, comes before the first label."""
    prompt = prompt_of(row)
    return tuple(prompt if len(prompt) > 1 else row.tokens)
