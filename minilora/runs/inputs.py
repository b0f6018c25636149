"""Rows of a run: training, validation and test split, and general text to measure drift on."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from minilora.errors import DataError
from minilora.models.config import Unit
from minilora.models.tokenizer import Tokenizer
from minilora.runs.classes import encode_classes, find_labels
from minilora.runs.config import DataConfig, TrainConfig
from minilora.runs.data import Dataset, encode_rows, use_prompt_style
from minilora.runs.evaluate import Choice, find_choices
from minilora.runs.rows import find_splits, read_eval_rows, read_rows
from minilora.storage import ASSETS, BUILTIN


@dataclass(frozen=True)
class Data:
    """Training rows; validation rows for the evaluations of a run; test rows for its summary."""

    tokenizer: Tokenizer
    train: Dataset
    valid: Dataset
    test: Dataset
    choices: list[Choice] | None
    files: dict[str, str]  # name -> SHA-256
    general: Dataset = Dataset(())
    labels: tuple[str, ...] = ()  # a classifier's

    @property
    def splits(self) -> dict[str, Dataset]:
        """Splits that have rows, by name; validation is left out if it is the test split."""
        found = {"training": self.train, "validation": self.valid, "held-out": self.test, "general": self.general}
        return {name: rows for name, rows in found.items() if rows and (name != "validation" or rows is not self.test)}


def load_data(
    names: Sequence[str],
    tokenizer: Tokenizer,
    reading: DataConfig,
    training: TrainConfig,
    unit: Unit | None = None,
    labels: tuple[str, ...] = (),
) -> Data:
    """Read and tokenize training, validation and test rows; the tokenizer gets the prompt style of the rows.

    If there is no test file, a share of the training rows is held out; and another one for validation, if the run
    selects the best adapter. With a `unit` rows have classes; without `labels`, those of the training rows are taken.

    Raises:
        DataError: a row that cannot be used, or there is no training file.
    """
    files = find_splits(names)
    if "train" not in files:
        raise DataError(f"{', '.join(names)}: there are no training rows; found {sorted(files)}")
    rows = {split: read_rows(*paths) for split, paths in files.items()}
    if unit is None:
        tokenizer = use_prompt_style(tokenizer, reading.prompt_style, rows["train"])
        encoded = {split: encode_rows(found, tokenizer, reading) for split, found in rows.items()}
    else:
        labels = labels or find_labels(rows["train"], unit, reading)
        encoded = {split: encode_classes(found, tokenizer, reading, unit, labels) for split, found in rows.items()}
    for split in ("test", "valid") if training.selects else ("test",):
        is_there = split in encoded or (split == "test" and "valid" in encoded and not training.selects)
        if not is_there and reading.eval_split and len(encoded["train"]) > 1:
            encoded |= _split_off(encoded["train"], split, reading.eval_split, training.seed)
    test = encoded.get("test") or encoded.get("valid") or Dataset(())
    valid = encoded.get("valid") or test
    choices = None if unit else find_choices([*encoded["train"], *test])
    return Data(tokenizer, encoded["train"], valid, test, choices, _hash_files(files), labels=labels)


def _split_off(whole: Dataset, split: str, share: float, seed: int) -> dict[str, Dataset]:
    shuffled = random.Random(seed).sample(whole.examples, len(whole))
    held = max(1, int(share * len(shuffled)))
    return {"train": replace(whole, examples=tuple(shuffled[held:])), split: Dataset(tuple(shuffled[:held]))}


def load_general(name: str, tokenizer: Tokenizer, reading: DataConfig) -> Dataset:
    """Read and tokenize general text, with a label on every token; "none" is an empty data set."""
    if name == "none":
        return Dataset(())
    path = ASSETS / "data" / "general.jsonl" if name == BUILTIN else name
    rows = read_eval_rows(path)
    return encode_rows(rows, tokenizer, replace(reading, train_on="all", system=None, text_field="text"))


def _hash_files(files: Mapping[str, Sequence[Path]]) -> dict[str, str]:
    """Return SHA-256 by file name, or by path if names are not distinct; a pipe, which is read once, has none."""
    paths = [path for found in files.values() for path in found if path.is_file()]
    names = [path.name for path in paths]
    is_distinct = len(set(names)) == len(names)
    return {(path.name if is_distinct else str(path)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
