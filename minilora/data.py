"""Training data: rows become tokens and labels, and examples become a batch.

    text     the prompt and the completion, closed by the end token
    labels   labels[i] = tokens[i] where token i is learned, else IGNORE_INDEX, as in the prompt

A token is learned if it shares a character with the completion. Counting the prompt's tokens would
fail where a token spans its end.

    N  tokens of a batch laid end to end    M  labels
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from minilora.definition import to_device

IGNORE_INDEX = -100  # the label of a token that is read but not learned
Span = tuple[int, int]  # first character, and the one after the last


@dataclass(frozen=True)
class Example:
    """A row as the model sees it."""

    tokens: list[int]
    labels: list[int]
    source: str = ""  # where the row was read, for messages

    @property
    def labelled(self) -> int:
        """How many labels are learned. The first token is never predicted, so it does not count."""
        return sum(label != IGNORE_INDEX for label in self.labels[1:])


def encode_row(row: Mapping[str, str], tokenizer: Any, eos_id: int) -> Example:
    """Encode the prompt and completion of a row with a `tokenizers.Tokenizer`."""
    text = row["prompt"] + row["completion"]
    encoding = tokenizer.encode(text)
    edges = [(0, 0), *encoding.offsets]  # some trim the span of " cat" to that of "cat"
    spans = [(min(before, begin), end) for (_, before), (begin, end) in pairwise(edges)]
    return label_completion(encoding.ids, spans, (len(row["prompt"]), len(text)), eos_id)


def label_completion(
    tokens: list[int], spans: Sequence[Span], learned: Span, eos_id: int | None
) -> Example:
    """Label the tokens of a span, and close the text with the end token, always learned."""
    labels = label_tokens(tokens, spans, [learned])
    if eos_id is None:
        return Example(tokens, labels)
    length = len(tokens) - (tokens[-1:] == [eos_id])  # without an end token that is there already
    return Example([*tokens[:length], eos_id], [*labels[:length], eos_id])


def label_tokens(
    tokens: Sequence[int], spans: Sequence[Span], learned: Sequence[Span]
) -> list[int]:
    """Label each token: with itself where it shares a character with a learned span."""
    labels = []
    for token, (begin, end) in zip(tokens, spans, strict=True):
        is_learned = any(max(begin, first) < min(end, last) for first, last in learned)
        labels.append(token if is_learned else IGNORE_INDEX)
    return labels


@dataclass(frozen=True)
class Batch:
    """Rows laid end to end."""

    tokens: Tensor  # (N)
    lengths: list[int]  # of the rows, sum N
    label_positions: Tensor  # (M), where a label is predicted
    labels: Tensor  # (M), the label at each


def collate(examples: Iterable[Example], device: torch.device) -> Batch:
    """Lay examples end to end. Their last tokens predict nothing: no label crosses a boundary."""
    tokens, targets, lengths = list[int](), list[int](), list[int]()
    for example in examples:
        tokens += example.tokens
        targets += [*example.labels[1:], IGNORE_INDEX]  # the target of a token is the next one
        lengths.append(len(example.tokens))
    positions = [i for i, target in enumerate(targets) if target != IGNORE_INDEX]
    labels = [targets[i] for i in positions]
    columns = (torch.tensor(ids, dtype=torch.int64) for ids in (tokens, positions, labels))
    inputs, *learned = (to_device(column, device) for column in columns)
    return Batch(inputs, lengths, *learned)
