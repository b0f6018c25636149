"""Load data sets: training rows, rows with classes, and the rows of a run by split, with general text beside them."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import random
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from minilora.durable import sha256_of
from minilora.errors import DataError, check_types
from minilora.models.config import Unit
from minilora.models.tokenizer import Tokenizer
from minilora.runs.classes import ClassEncoder, encode_classes, find_labels
from minilora.runs.config import DataConfig, TrainConfig
from minilora.runs.data import TextEncoder, encode_rows, use_prompt_style
from minilora.runs.dataset import Dataset, Encoder, build_dataset, keep_dataset
from minilora.runs.evaluate import Choice, find_choices
from minilora.runs.rows import (
    count_lines,
    find_eval_files,
    find_splits,
    holds_word,
    is_named_held_out,
    read_eval_rows,
    stream_rows,
)
from minilora.storage import ASSETS, BUILTIN

LARGE = 2**25  # bytes of files from which on their rows are encoded by several processes and kept on the disk
LAYOUT = 1  # of what is kept; a change of how rows are encoded needs another number


def load_dataset(
    path: str | Path | Sequence[str | Path], tokenizer: Tokenizer, config: DataConfig | None = None
) -> Dataset:
    """Read and tokenize the rows of files, and the training rows of directories.

    Raises:
        DataError: a row cannot be used (with file and line); a file without rows.
    """
    check_types(load_dataset, locals())
    config, paths = config or DataConfig(), _find_files(path)["train"]
    return encode_rows(stream_rows(*paths), _use_prompt_style(tokenizer, config, paths), config)


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
    config, paths = config or DataConfig(), _find_files(path)["train"]
    labels = tuple(labels) or find_labels(stream_rows(*paths), unit, config)
    return encode_classes(stream_rows(*paths), tokenizer, config, unit, labels), labels


@dataclass(frozen=True)
class Data:
    """A run's tokenized rows: to train on, to evaluate during it (valid) and after it (test), and general text."""

    tokenizer: Tokenizer
    train: Dataset
    valid: Dataset
    test: Dataset
    choices: list[Choice] | None
    files: dict[str, str]  # name -> SHA-256
    general: Dataset = field(default_factory=Dataset)
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
    folder: Path | None = None,
    show: Callable[[str], None] | None = None,
) -> Data:
    """Read and tokenize training, validation and test rows; the tokenizer gets their prompt style.

    The test rows are those of `held_out`, if it is given. Without a test file, a share of the training rows is held
    out, and another one for validation if the run selects the best adapter. With a `unit` rows have classes, by default
    all labels of the training rows. Rows of large files are kept in `folder`, if it is given, and `show` is called with
    lines on the progress.

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
    if unit is None:
        tokenizer = _use_prompt_style(tokenizer, reading, files["train"])
        encode: Encoder = TextEncoder(tokenizer, reading)
    else:
        labels = labels or find_labels(stream_rows(*files["train"]), unit, reading)
        encode = ClassEncoder(tokenizer, reading, unit, labels)
    encoded = {split: _encode(paths, encode, folder, show) for split, paths in files.items()}
    for split in ("test", "valid") if training.selects else ("test",):
        is_there = split in encoded or (split == "test" and "valid" in encoded and not training.selects)
        whole = encoded["train"]
        if not is_there and reading.eval_split and len(whole) > 1:
            shuffled = whole.rows[_shuffled(len(whole), training.seed)]
            held = max(1, int(reading.eval_split * len(shuffled)))
            encoded["train"], encoded[split] = replace(whole, rows=shuffled[held:]), whole.take(shuffled[:held])
    test = encoded.get("test") or encoded.get("valid") or Dataset()
    valid = encoded.get("valid") or test
    choices = None if unit else find_choices(encoded["train"], test)
    return Data(tokenizer, encoded["train"], valid, test, choices, _hash_files(files), labels=labels)


def _use_prompt_style(tokenizer: Tokenizer, config: DataConfig, paths: Sequence[Path]) -> Tokenizer:
    may_need = any(holds_word(path, b"instruction") for path in paths)  # which is seen sooner than in parsed rows
    return use_prompt_style(tokenizer, config.prompt_style, stream_rows(*paths) if may_need else ())


def _shuffled(count: int, seed: int) -> array[int]:
    """Return `random.Random(seed).sample(range(count), count)`, which takes 60 bytes a number."""
    draw, pool, found = random.Random(seed), array("q", range(count)), array("q")
    for left in range(count, 0, -1):
        chosen = draw.randrange(left)
        found.append(pool[chosen])
        pool[chosen] = pool[left - 1]
    return found


def _encode(paths: Sequence[Path], encode: Encoder, folder: Path | None, show: Callable[[str], None] | None) -> Dataset:
    """Encode the rows of files; keep those of large ones in the folder, or reuse those that it has."""
    if folder is None or sum(path.stat().st_size for path in paths) < LARGE:
        return build_dataset(stream_rows(*paths), encode)
    versions = [importlib.metadata.version(name) for name in ("minilora", "tokenizers", "jinja2")]
    parts = [LAYOUT, versions, encode.key, [(str(path), sha256_of(path)) for path in paths]]

    def write(directory: Path) -> None:
        lines = {str(path): count_lines(path) for path in paths}

        def report(source: str) -> None:
            path, _, line = source.rpartition(":")
            if show:
                show(f"encoding {path}: {int(line):,} of {lines[path]:,} lines")

        build_dataset(stream_rows(*paths), encode, directory, report)

    return keep_dataset(folder, hashlib.sha256(json.dumps(parts).encode()).hexdigest(), write)


def load_general(name: str, tokenizer: Tokenizer, reading: DataConfig) -> Dataset:
    """Read and tokenize general text, with a label on every token; "none" is an empty data set."""
    if name == "none":
        return Dataset()
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
