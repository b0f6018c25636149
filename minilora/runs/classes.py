"""Rows with labels become tokens and classes.

    {"text": …, "label": …}                       a sequence
    {"tokens": [word, …], "labels": [label, …]}   words, joined by spaces

A label is text or a whole number. The class of a sequence is predicted at its last token, that of a word at the first
token of the word.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

from minilora.data import IGNORE_INDEX, Example
from minilora.errors import ConfigError, DataError
from minilora.models.config import Unit
from minilora.models.tokenizer import Tokenizer
from minilora.runs.config import DataConfig
from minilora.runs.dataset import Dataset, build_dataset, usable
from minilora.runs.formats import EMPTY, check_text
from minilora.runs.rows import Row

UNUSED = ("train_on", "prompt_style", "system")  # settings without effect on classes
NUMBER = re.compile(r"-?[0-9]+")


def find_labels(rows: Iterable[Row], unit: Unit, config: DataConfig) -> tuple[str, ...]:
    """Return the labels of the rows in numerical order if all are numbers, else in alphabetical order.

    Raises:
        DataError: a row cannot be used, unless such rows are skipped; there are fewer than two labels.
    """

    def labels_of(row: Row) -> Iterable[str]:
        return _parse(row, unit, config)[1].values()

    stream = iter(rows)
    first, found, bad, total = next(stream), set[str](), list[str](), 0
    for labels in usable(chain([first], stream), labels_of, config.skip_bad_rows, bad):
        found.update(labels)
        total += 1
    if len(found) < 2:
        raise DataError(
            f"{first.source}: all {total + len(bad)} rows have the labels {sorted(found)}; need at least two"
        )
    numbers = all(map(NUMBER.fullmatch, found))
    return tuple(sorted(found, key=lambda label: (int(label) if numbers else 0, label)))


@dataclass(frozen=True)
class ClassEncoder:
    """Tokenize a row and give one token of a sequence, or of each word, its class: an index into `labels`.

    Where no label is a number, a number in a row is such an index. See `dataset.Encoder`.

    Raises:
        ConfigError: a setting that has no effect on classes is not at its default.
        DataError: the row cannot be used.
    """

    tokenizer: Tokenizer
    config: DataConfig
    unit: Unit
    labels: tuple[str, ...]
    shift: int = 0

    def __post_init__(self) -> None:
        if idle := [name for name in UNUSED if getattr(self.config, name) != getattr(DataConfig(), name)]:
            raise ConfigError(f"{', '.join(idle)}: without effect where rows have classes; leave it out")

    @property
    def key(self) -> str:
        return f"{self.tokenizer.key} {self.config.key} {self.unit} {json.dumps(self.labels)}"

    @cached_property
    def _indices(self) -> dict[str, int]:
        indices = {label: i for i, label in enumerate(self.labels)}
        return indices if any(map(NUMBER.fullmatch, self.labels)) else indices | {str(i): i for i in indices.values()}

    def __call__(self, row: Row) -> tuple[Example, Sequence[str]]:
        texts, names = _parse(row, self.unit, self.config)
        for where, name in names.items():
            if name not in self._indices:
                known = list(self._indices)
                raise DataError(f"{where}: found {name!r:.60}, which is not among the known {known!r:.200}")
        quoted = texts if self.config.allow_special else self.tokenizer.quote(texts)
        if self.unit == "sequence":
            tokens, places = _tokenize_sequence(quoted[0], self.tokenizer, self.config.max_length)
        else:
            tokens, places = _tokenize_words(quoted, self.tokenizer)
        classes = [IGNORE_INDEX] * len(tokens)
        for place, name in zip(places, names.values(), strict=True):
            classes[place] = self._indices[name]
        return Example(tokens, classes, row.source, shift=0), ["quoted"] if quoted != texts else []


def encode_classes(
    rows: Iterable[Row], tokenizer: Tokenizer, config: DataConfig, unit: Unit, labels: Sequence[str]
) -> Dataset:
    """Tokenize every row and give its tokens their classes, as `ClassEncoder` does.

    Raises:
        ConfigError: a setting that has no effect on classes is not at its default.
        DataError: a row cannot be used, unless such rows are skipped; no row has a label left.
    """
    return build_dataset(rows, ClassEncoder(tokenizer, config, unit, tuple(labels)))


def _parse(row: Row, unit: Unit, config: DataConfig) -> tuple[list[str], dict[str, str]]:
    """Return the text of a row, or its words, and each label by the name of its field."""
    fields = row.fields
    if unit == "sequence":
        key = config.text_field or "text"
        texts, labels = [check_text(fields.get(key), key, is_target=True)], {"label": fields.get("label")}
    else:
        for key in ("tokens", "labels"):
            if not isinstance(fields.get(key), list):
                raise DataError(f"{key}: found {fields.get(key)!r:.60}, need a list")
        texts, labels = fields["tokens"], {f"labels[{i}]": label for i, label in enumerate(fields["labels"])}
        if not texts:
            raise DataError(f"tokens: {EMPTY}")
        if len(texts) != len(labels):
            raise DataError(f"labels: found {len(labels)} for {len(texts)} tokens, need one for each")
        for i, word in enumerate(texts):
            if not check_text(word, f"tokens[{i}]").strip():
                raise DataError(f"tokens[{i}]: found {word!r}, need a word")
    for where, label in labels.items():
        if isinstance(label, bool) or not isinstance(label, str | int) or label == "":
            raise DataError(f"{where}: found {label!r:.60}, need text or a whole number")
    return texts, {where: check_text(str(label), where) for where, label in labels.items()}


def _tokenize_sequence(text: str, tokenizer: Tokenizer, limit: int) -> tuple[list[int], list[int]]:
    """Return the tokens, and the index of the last one within the limit."""
    tokens = tokenizer.encode(text)
    pad = tokenizer.token_id(tokenizer.special_tokens.get("pad_token"))
    while tokens[-1:] == [pad]:  # transformers reads the class before the pad token, even if that ends every text
        tokens.pop()
    if not tokens:
        raise DataError("text: the tokenizer makes no token of it")
    return tokens, [min(len(tokens), limit) - 1]


def _tokenize_words(words: Sequence[str], tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Return the tokens of the words joined by spaces, and the index of the token in which each word begins."""
    tokens, spans = tokenizer.encode_spans(" ".join(words))
    ends, places, begin = [end for _, end in spans], list[int](), 0
    for i, word in enumerate(words):
        place = bisect_right(ends, begin)
        if place == len(tokens) or place in places[-1:]:
            raise DataError(f"tokens[{i}]: the tokenizer has no token of its own for {word!r:.60}")
        places.append(place)
        begin += len(word) + 1
    return tokens, places
