"""Load data sets: training rows, rows with classes, and the rows of a run by split, with general text beside them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from minilora.durable import sha256_of
from minilora.errors import DataError, check_types
from minilora.models.config import Unit
from minilora.models.tokenizer import Tokenizer
from minilora.runs.classes import encode_classes, find_labels
from minilora.runs.config import DataConfig, TrainConfig
from minilora.runs.data import Dataset, encode_rows, use_prompt_style
from minilora.runs.evaluate import Choice, find_choices
from minilora.runs.rows import find_eval_files, find_splits, is_named_held_out, read_eval_rows, read_rows
from minilora.storage import ASSETS, BUILTIN


def load_dataset(
    path: str | Path | Sequence[str | Path], tokenizer: Tokenizer, config: DataConfig | None = None
) -> Dataset:
    """Read and tokenize the rows of files, and the training rows of directories.

    Raises:
        DataError: a row cannot be used (with file and line); a file without rows.
    """
    check_types(load_dataset, locals())
    config, rows = config or DataConfig(), read_rows(*_find_files(path)["train"])
    return encode_rows(rows, use_prompt_style(tokenizer, config.prompt_style, rows), config)


def load_classes(
    path: str | Path | Sequence[str | Path],
    tokenizer: Tokenizer,
    unit: Unit,
    config: DataConfig | None = None,
    labels: Sequence[str] = (),
) -> tuple[Dataset, tuple[str, ...]]:
    """Read and tokenize rows with classes, as `load_dataset` does; return them with their labels.

    Raises:
        DataError: a row cannot be used, or has none of the `labels`, if any are given; a file without rows.
    """
    check_types(load_classes, locals())
    config, rows = config or DataConfig(), read_rows(*_find_files(path)["train"])
    labels = tuple(labels) or find_labels(rows, unit, config)
    return encode_classes(rows, tokenizer, config, unit, labels), labels


@dataclass(frozen=True)
class Data:
    """A run's tokenized rows: to train on, to evaluate during it (valid) and after it (test), and general text."""

    tokenizer: Tokenizer
    train: Dataset
    valid: Dataset
    test: Dataset
    choices: list[Choice] | None
    files: dict[str, str]  # name -> SHA-256
    general: Dataset = Dataset(())
    labels: tuple[str, ...] = ()  # of a classifier

    @property
    def splits(self) -> dict[str, Dataset]:
        """Return the splits that have rows, by name, without the validation split where it is the test split."""
        found = {"training": self.train, "validation": self.valid, "held-out": self.test, "general": self.general}
        return {name: rows for name, rows in found.items() if rows and (name != "validation" or rows is not self.test)}


def load_data(
    names: Sequence[str],
    tokenizer: Tokenizer,
    reading: DataConfig,
    training: TrainConfig,
    unit: Unit | None = None,
    labels: tuple[str, ...] = (),
    held_out: str | None = None,
) -> Data:
    """Read and tokenize training, validation and test rows; the tokenizer gets their prompt style.

    The test rows are those of `held_out`, if it is given. Without a test file, a share of the training rows is held
    out, and another one for validation if the run selects the best adapter. With a `unit` rows have classes, by default
    all labels of the training rows.

    Raises:
        DataError: a row cannot be used; there is no training file; one of several files has the name of a split; or
            there are two test splits.
    """
    files = _find_files(names)
    if len(names) > 1 and (found := [path for path in files["train"] if is_named_held_out(path)]):
        raise DataError(f"{found[0]}: --data would train on it; give it as --eval-data, or under another name")
    if held_out is not None:
        if "test" in files:
            raise DataError(f"{held_out}: --data has a test split, {files['test'][0]}; leave --eval-data out")
        files["test"] = find_eval_files(held_out)
        if both := {path.resolve() for path in files["test"]} & {path.resolve() for path in files["train"]}:
            raise DataError(f"{both.pop()}: is in --data and in --eval-data; rows that are trained on are not held out")
    rows = {split: read_rows(*paths) for split, paths in files.items()}
    if unit is None:
        tokenizer = use_prompt_style(tokenizer, reading.prompt_style, rows["train"])
        encoded = {split: encode_rows(found, tokenizer, reading) for split, found in rows.items()}
    else:
        labels = labels or find_labels(rows["train"], unit, reading)
        encoded = {split: encode_classes(found, tokenizer, reading, unit, labels) for split, found in rows.items()}
    for split in ("test", "valid") if training.selects else ("test",):
        is_there = split in encoded or (split == "test" and "valid" in encoded and not training.selects)
        whole = encoded["train"]
        if not is_there and reading.eval_split and len(whole) > 1:
            shuffled = random.Random(training.seed).sample(whole.examples, len(whole))
            held = max(1, int(reading.eval_split * len(shuffled)))
            encoded["train"] = replace(whole, examples=tuple(shuffled[held:]))
            encoded[split] = Dataset(tuple(shuffled[:held]))
    test = encoded.get("test") or encoded.get("valid") or Dataset(())
    valid = encoded.get("valid") or test
    choices = None if unit else find_choices([*encoded["train"], *test])
    return Data(tokenizer, encoded["train"], valid, test, choices, _hash_files(files), labels=labels)


def load_general(name: str, tokenizer: Tokenizer, reading: DataConfig) -> Dataset:
    """Read and tokenize general text, with a label on every token; "none" is an empty data set."""
    if name == "none":
        return Dataset(())
    path = ASSETS / "data" / "general.jsonl" if name == BUILTIN else name
    rows = read_eval_rows(path)
    return encode_rows(rows, tokenizer, replace(reading, train_on="all", system=None, text_field="text"))


def _find_files(names: str | Path | Sequence[str | Path]) -> dict[str, list[Path]]:
    """Return the files of a data set by split; raise a DataError if there are none to train on."""
    files = find_splits(names)
    if "train" not in files:
        shown = names if isinstance(names, str | Path) else ", ".join(map(str, names))
        raise DataError(f"{shown}: there are no training rows; found {sorted(files)}")
    return files


def _hash_files(files: Mapping[str, Sequence[Path]]) -> dict[str, str]:
    """Return SHA-256 by file name, or by path where names repeat; a pipe, which can be read once, has none."""
    paths = [path for found in files.values() for path in found if path.is_file()]
    is_distinct = len({path.name for path in paths}) == len(paths)
    return {(path.name if is_distinct else str(path)): sha256_of(path) for path in paths}
