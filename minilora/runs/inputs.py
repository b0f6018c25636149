"""What goes into a run: its rows, split into those to learn from and those to look at, and general text."""

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
from minilora.runs.rows import find_splits, read_held_out, read_rows
from minilora.storage import ASSETS, BUILTIN


@dataclass(frozen=True)
class Data:
    """What a run learns from; what it is watched with while it learns; what it is judged by in the end."""

    tokenizer: Tokenizer
    train: Dataset
    valid: Dataset
    test: Dataset
    choices: list[Choice] | None
    files: dict[str, str]  # name -> SHA-256
    general: Dataset = Dataset(())
    labels: tuple[str, ...] = ()  # of classes

    @property
    def splits(self) -> dict[str, Dataset]:
        """Name -> rows, each set of rows once."""
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
    """Training, validation and test rows, and the tokenizer in the prompt style that they are written in.

    Without files of their own, a share of the training rows is held out; and another one to choose the best adapter
    with, if the run does. With a `unit` rows have classes, of the `labels`, or else of those of the training rows.

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
            encoded |= _hold_out(encoded["train"], split, reading.eval_split, training.seed)
    test = encoded.get("test") or encoded.get("valid") or Dataset(())
    valid = encoded.get("valid") or test
    choices = None if unit else find_choices([*encoded["train"], *test])
    return Data(tokenizer, encoded["train"], valid, test, choices, _digests(files), labels=labels)


def _hold_out(whole: Dataset, split: str, share: float, seed: int) -> dict[str, Dataset]:
    shuffled = random.Random(seed).sample(whole.examples, len(whole))
    held = max(1, int(share * len(shuffled)))
    return {"train": replace(whole, examples=tuple(shuffled[held:])), split: Dataset(tuple(shuffled[:held]))}


def load_general(name: str, tokenizer: Tokenizer, reading: DataConfig) -> Dataset:
    """General text, every token of it to be predicted; empty for "none"."""
    if name == "none":
        return Dataset(())
    path = ASSETS / "data" / "general.jsonl" if name == BUILTIN else name
    rows = read_held_out(path)
    return encode_rows(rows, tokenizer, replace(reading, train_on="all", system=None, text_field="text"))


def _digests(files: Mapping[str, Sequence[Path]]) -> dict[str, str]:
    """SHA-256 by file name, or by path where names are not distinct; of a pipe, which is read once, there is none."""
    paths = [path for found in files.values() for path in found if path.is_file()]
    names = [path.name for path in paths]
    is_distinct = len(set(names)) == len(names)
    return {(path.name if is_distinct else str(path)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
