"""Rows that are answered by classes: a text with its label, or words with a label for each.

    {"text": …, "label": …}                       a sequence
    {"tokens": [word, …], "labels": [label, …]}   words, which are read with a space between them

A label is text or a whole number. It is learned at one token: that of a sequence at the last one, which has read all
of it; that of a word, as is usual, at the word's first.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minilora.errors import ConfigError, DataError
from minilora.models.ops import IGNORE_INDEX
from minilora.models.tokenizer import Tokenizer
from minilora.runs.config import DataConfig
from minilora.runs.data import Dataset, Example, gather, located
from minilora.runs.formats import EMPTY, Fields, text_of
from minilora.runs.rows import Row, read_training_rows

if TYPE_CHECKING:
    from minilora.models.config import Unit

UNUSED = ("train_on", "prompt_style", "system")  # settings that say nothing about classes


@dataclass(frozen=True)
class Classified:
    """What a row means: texts, each with the name of its class. A sequence is one text, words are several."""

    texts: list[str]
    labels: list[str]


def load_classes(
    path: str | Path | Sequence[str | Path],
    tokenizer: Tokenizer,
    unit: Unit,
    config: DataConfig | None = None,
    labels: Sequence[str] = (),
) -> tuple[Dataset, tuple[str, ...]]:
    """The rows of files, and the training rows of directories, encoded; and the labels, if not given those found.

    Raises:
        DataError: a row that cannot be used, with file and line; a file without rows.
    """
    config = config or DataConfig()
    rows = read_training_rows(path)
    labels = tuple(labels) or find_labels(rows, unit, config)
    return encode_classes(rows, tokenizer, config, unit, labels), labels


def find_labels(rows: Sequence[Row], unit: Unit, config: DataConfig) -> tuple[str, ...]:
    """The labels of the rows in order: of their numbers if all are numbers, else of the alphabet.

    Raises:
        DataError: a row that cannot be used, unless those are skipped; fewer than two labels.
    """
    found: set[str] = set()
    for row in rows:
        try:
            found |= set(_read(row, unit, config).labels)
        except DataError:
            if not config.skip_bad_rows:
                raise
    if len(found) < 2:
        raise DataError(f"{rows[0].source}: all {len(rows)} rows have the labels {sorted(found)}; need at least two")
    numbers = all(map(_is_number, found))
    return tuple(sorted(found, key=lambda label: (int(label) if numbers else 0, label)))


def encode_classes(
    rows: Sequence[Row], tokenizer: Tokenizer, config: DataConfig, unit: Unit, labels: Sequence[str]
) -> Dataset:
    """Tokens of every row, and at one token of each sequence, or of each word, its class: its place in `labels`.

    Where no label is a number, a number is such a place.

    Raises:
        ConfigError: a setting that has no effect on classes is not at its default.
        DataError: a row that cannot be used, unless those are skipped; no row has a label left.
    """
    if idle := [name for name in UNUSED if getattr(config, name) != getattr(DataConfig(), name)]:
        raise ConfigError(f"{', '.join(idle)}: without effect where rows have classes; leave it out")
    classes = {label: i for i, label in enumerate(labels)}
    if not any(map(_is_number, labels)):
        classes |= {str(i): i for i in range(len(labels))}

    def encode(row: Row) -> tuple[Example, bool, bool]:
        meaning = _read(row, unit, config)
        texts = meaning.texts if config.allow_special else tokenizer.quote(meaning.texts)
        with located(row.source):
            wanted = _classes(meaning.labels, classes, unit)
            place = _encode_sequence if unit == "sequence" else _encode_words
            tokens, found = place(texts, wanted, tokenizer, config.max_length)
        return Example(tokens, found, row.source, shift=0), False, texts != meaning.texts

    return gather(rows, encode, config)


def _read(row: Row, unit: Unit, config: DataConfig) -> Classified:
    with located(row.source):
        if row.problem:
            raise DataError(row.problem)
        if unit == "sequence":
            text = text_of(row.fields, config.text_field or "text", is_learned=True)
            return Classified([text], [_label(row.fields.get("label"), "label")])
        words, labels = _list(row.fields, "tokens"), _list(row.fields, "labels")
        if len(words) != len(labels):
            raise DataError(f"labels: found {len(labels)} for {len(words)} tokens, need one for each")
        for i, word in enumerate(words):
            if not text_of({f"tokens[{i}]": word}, f"tokens[{i}]").strip():
                raise DataError(f"tokens[{i}]: found {word!r}, need a word")
        return Classified(words, [_label(label, f"labels[{i}]") for i, label in enumerate(labels)])


def _list(fields: Fields, key: str) -> list[Any]:
    value = fields.get(key)
    if not isinstance(value, list):
        raise DataError(f"{key}: found {value!r:.60}, need a list")
    if not value:
        raise DataError(f"{key}: {EMPTY}")
    return value


def _label(value: Any, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise DataError(f"{where}: found {value!r:.60}, need text or a whole number")
    return text_of({where: str(value)}, where)


def _is_number(label: str) -> bool:
    return re.fullmatch(r"-?[0-9]+", label) is not None


def _classes(labels: Sequence[str], known: Mapping[str, int], unit: Unit) -> list[int]:
    for i, label in enumerate(labels):
        if label not in known:
            where = "label" if unit == "sequence" else f"labels[{i}]"
            raise DataError(f"{where}: found {label!r:.60}, which is not among the known {list(known)!r:.200}")
    return [known[label] for label in labels]


def _encode_sequence(
    texts: Sequence[str], classes: Sequence[int], tokenizer: Tokenizer, limit: int
) -> tuple[list[int], list[int]]:
    """A text, and its class at the last token that is not cut off."""
    tokens = tokenizer.encode(texts[0])
    pad = tokenizer.token_id(tokenizer.special_tokens.get("pad_token"))
    while tokens[-1:] == [pad]:  # where it ends every text, too, transformers reads the class before it
        tokens.pop()
    if not tokens:
        raise DataError("text: the tokenizer makes no token of it")
    labels = [IGNORE_INDEX] * len(tokens)
    labels[min(len(tokens), limit) - 1] = classes[0]
    return tokens, labels


def _encode_words(
    texts: Sequence[str], classes: Sequence[int], tokenizer: Tokenizer, limit: int
) -> tuple[list[int], list[int]]:
    """Words with a space between them, and the class of each at the token in which it begins."""
    tokens, spans = tokenizer.encode_spans(" ".join(texts))
    ends = [end for _, end in spans]
    labels, begin = [IGNORE_INDEX] * len(tokens), 0
    for i, (word, wanted) in enumerate(zip(texts, classes, strict=True)):
        place = bisect_right(ends, begin)
        if place == len(tokens) or labels[place] != IGNORE_INDEX:
            raise DataError(f"tokens[{i}]: the tokenizer has no token of its own for {word!r:.60}")
        labels[place] = wanted
        begin += len(word) + 1
    return tokens, labels
