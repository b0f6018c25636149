"""Encoded rows as arrays, in temporary files that are mapped into memory: their tokens may be more than fit there.

Rows are read as a stream and encoded one by one.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from tempfile import TemporaryFile
from typing import IO, Any, overload

import numpy as np
from numpy.typing import NDArray

from minilora import data
from minilora.errors import DataError
from minilora.runs.config import DataConfig
from minilora.runs.formats import Row

BAD_ROWS = 50_000  # that are skipped and kept with their reasons

INT32 = np.dtype(np.int32)
# Where a row lies in the tokens, how many of its labels are learned and how many were cut off, its largest id, and the
# index of its source.
ROW = np.dtype([(name, np.int64) for name in ("begin", "length", "labelled", "lost", "largest", "source")])
SHOWN = 10_000  # rows from one line on the progress to the next


@dataclass(frozen=True)
class Example(data.Example):
    """A row as the model sees it, and where it was read."""

    source: str = ""

    @property
    def labelled(self) -> int:
        """How many labels are learned. The first token of a text is never predicted, so it does not count."""
        return sum(label != data.IGNORE_INDEX for label in self.labels[1:])


Encode = Callable[[Row], tuple[Example, Iterable[str]]]  # returns also names of counts of `Dataset` that are one more


@dataclass(frozen=True, repr=False, eq=False)
class Dataset(Sequence[Example]):
    """A sequence of tokenized rows, and counts of what was changed or dropped.

    `truncated` rows were cut to `max_length`; `unlabelled` rows had no label left and were dropped, as were rows that
    cannot be used: `bad` has an error message for each. `conversations` are rows rendered by a chat template, `moved`
    those of them whose answer follows other text than in the conversation as the template alone writes it;
    `completions` are those of a prompt and a completion as plain text, of which `touching` have no white space between
    the two; `quoted` are rows whose control tokens are encoded as plain text.

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
    moved: int = 0
    completions: int = 0
    touching: int = 0
    quoted: int = 0

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


def lengths_of(examples: Sequence[Example]) -> NDArray[np.int64]:
    """Return the number of tokens of each example."""
    return examples.lengths if isinstance(examples, Dataset) else np.array([len(each.tokens) for each in examples], int)


def sizes_of(examples: Sequence[Example]) -> NDArray[Any]:
    """Return the numbers of tokens and of learned labels of each example, (rows, 2)."""
    if isinstance(examples, Dataset):
        return np.column_stack([examples.lengths, examples.labelled])
    return np.array([(len(each.tokens), each.labelled) for each in examples], int).reshape(-1, 2)


def build_dataset(
    rows: Iterable[Row], encode: Encode, config: DataConfig, show: Callable[[str], None] | None = None
) -> Dataset:
    """Encode rows, cut them to the maximum length, and drop those without a label.

    `show` is called with lines on the progress.

    Raises:
        DataError: a row cannot be used, and `skip_bad_rows` is not set or too many cannot; or no label is left.
    """
    counts, bad, sources, first = Counter[str](), list[str](), list[str](), ""
    places, begin = array("q"), 0
    with TemporaryFile() as tokens, TemporaryFile() as labels:
        for number, row in enumerate(rows, start=1):
            first = first or row.source
            if show and number % SHOWN == 0:
                show(f"encoding {row.source}")
            try:
                if row.problem:
                    raise DataError(row.problem)
                whole, names = encode(row)
            except DataError as error:
                bad.append(f"{row.source}: {error}")
                if not config.skip_bad_rows or len(bad) > BAD_ROWS:
                    raise DataError(bad[-1]) from error
                continue
            counts.update(names)
            cut = replace(whole, tokens=whole.tokens[: config.max_length], labels=whole.labels[: config.max_length])
            length, lost = len(cut.tokens), whole.labelled - cut.labelled
            counts.update(truncated=int(length < len(whole.tokens)), unlabelled=int(not cut.labelled))
            if cut.labelled:
                places.extend((begin, length, cut.labelled, lost, max(cut.tokens), len(sources)))
                begin += length
                sources.append(row.source)
                tokens.write(np.array(cut.tokens, INT32).tobytes())
                labels.write(np.array(cut.labels, INT32).tobytes())
        if not begin:
            total, limit = counts["unlabelled"] + len(bad), config.max_length
            skipped = f"; {len(bad)} were skipped, the first: {bad[0]}" if bad else ""
            raise DataError(f"{first}: no row of {total} has a label within its first {limit} tokens{skipped}")
        values: dict[str, Any] = {"tokens": _mapped(tokens), "labels": _mapped(labels), **counts}
    return Dataset(**values, rows=np.frombuffer(places, ROW), sources=sources, bad=tuple(bad))


def _mapped(file: IO[bytes]) -> NDArray[np.int32]:
    """Return the numbers of a file, which are read when they are used."""
    file.flush()
    return np.asarray(np.memmap(file, INT32, "r"))
