"""Encoded rows as arrays, which may be files that are mapped into memory: their tokens may be more than fit there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from minilora import data

INT32 = np.dtype(np.int32)
# Where a row lies in the tokens, how many of its labels are learned and how many were cut off, its largest id, and the
# index of its source.
ROW = np.dtype([(name, np.int64) for name in ("begin", "length", "labelled", "lost", "largest", "source")])


@dataclass(frozen=True)
class Example(data.Example):
    """A row as the model sees it, and where it was read."""

    source: str = ""

    @property
    def labelled(self) -> int:
        """How many labels are learned. The first token of a text is never predicted, so it does not count."""
        return sum(label != data.IGNORE_INDEX for label in self.labels[1:])


@dataclass(frozen=True, repr=False, eq=False)
class Dataset(Sequence[Example]):
    """A sequence of tokenized rows, and counts of what was changed or dropped.

    `truncated` rows were cut to `max_length`; `unlabelled` rows had no label left and were dropped, as were rows that
    cannot be used: `bad` has an error message for each. `conversations` are rows rendered by a chat template;
    in `quoted` ones control tokens are encoded as plain text. `system` is the system prompt that all rows have.

    `tokens` and `labels` are those of all rows, end to end; `rows` says where those of each row lie.
    """

    tokens: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, INT32))
    labels: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, INT32))
    rows: NDArray[Any] = field(default_factory=lambda: np.empty(0, ROW))
    sources: Sequence[str] = ()
    truncated: int = 0
    unlabelled: int = 0
    bad: tuple[str, ...] = ()
    conversations: int = 0
    quoted: int = 0
    system: str | None = None

    def __repr__(self) -> str:
        counts = f"{self.truncated} truncated, {self.unlabelled} unlabelled, {len(self.bad)} bad"
        return f"Dataset({len(self)} rows, {self.lengths.sum()} tokens, {counts})"

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Dataset: ...
    def __getitem__(self, index: int | slice) -> Example | Dataset:
        if isinstance(index, slice):
            return self.take(self.rows[index])
        begin, length, *_, source = self.rows[index].item()
        tokens, labels = (held[begin : begin + length].tolist() for held in (self.tokens, self.labels))
        return Example(tokens, labels, self.sources[source])

    def take(self, rows: NDArray[Any]) -> Dataset:
        """Return a data set of some of the `rows`, in their order, without the counts."""
        return Dataset(self.tokens, self.labels, rows, self.sources)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """The number of tokens of each row."""
        return self.rows["length"]

    @property
    def labelled(self) -> NDArray[np.int64]:
        """The number of labels of each row that are learned."""
        return self.rows["labelled"]


def repeated_prompts(held_out: Dataset, training: Dataset) -> int:
    """Return the number of held-out rows that begin with the prompt of a training row, or equal one that has none."""
    counts = Counter(_prompts(held_out))
    repeated = {prompt for prompt in _prompts(training) if prompt in counts}
    return sum(counts[prompt] for prompt in repeated)


def _prompts(rows: Dataset) -> Iterator[bytes]:
    """Yield the prompt of each row, or the whole row if at most one token, as BOS is, comes before the first label."""
    for begin, length, *_ in rows.rows.tolist():
        is_label = rows.labels[begin : begin + length] != data.IGNORE_INDEX
        first = int(is_label.argmax())
        yield rows.tokens[begin : begin + (first if first > 1 else length)].tobytes()


def lengths_of(rows: Sequence[Any]) -> NDArray[np.int64]:
    """Return the number of `tokens` of each row; 0 if it has none."""
    if isinstance(rows, Dataset):
        return rows.lengths
    return np.array([len(getattr(rows[i], "tokens", ())) for i in range(len(rows))], np.int64)
