"""Data files, and the data sets that are read from them: by split, as tokens and labels, with general text beside them.

A file holds a JSON array of objects or one object a line, distinguished by its first character, and may be compressed
(`.gz`). A byte order mark at its beginning is accepted; lines end in LF or CRLF.
"""

from __future__ import annotations

import codecs
import gzip
import itertools
import json
import random
import re
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from minilora.adapters.layout import tokenizer_of
from minilora.errors import DataError, FormatError, check_types, check_utf8
from minilora.files import ASSETS, BUILTIN, JSON_VALUES, check_link, open_file, sha256_of
from minilora.models.hub import DATA_ENDINGS, fetch
from minilora.models.tokenizer import Tokenizer, load_tokenizer
from minilora.runs.config import DataConfig, Settings, TrainConfig
from minilora.runs.dataset import BAD_ROWS, Dataset
from minilora.runs.encoders import encode_rows, use_prompt_style
from minilora.runs.evaluate import Choice, find_choices
from minilora.runs.formats import Row

LINE_BYTES = 2**23  # of one row; a long book has 2 MB
CHUNK = 2**20  # bytes that are read at a time
UNPACKED, UNPACKED_TIMES = 2**20, 50  # bytes of a .gz file, and more for each compressed byte; text has 3 to 20

LAYOUTS = "one JSON object a line, or one array of them"
SPLITS = {"train": ("train",), "valid": ("valid", "validation", "val"), "test": ("test",)}  # names of their files
HELD_OUT = {*SPLITS["valid"], *SPLITS["test"], "dev", "eval"}


def load_dataset(
    path: str | Path | Sequence[str | Path], tokenizer: Tokenizer, config: DataConfig | None = None
) -> Dataset:
    """Read and tokenize the rows of files, and the training rows of directories.

    Raises:
        DataError: a row cannot be used (with file and line); a file without rows.
    """
    check_types(load_dataset, locals())
    config, paths = config or DataConfig(), _training_files(path)["train"]
    tokenizer = use_prompt_style(tokenizer, config.prompt_style, stream_rows(*paths))
    return encode_rows(stream_rows(*paths), tokenizer, config)


@dataclass(frozen=True)
class Data:
    """A run's tokenized rows: to train on, to evaluate during it (valid) and after it (test), and general text."""

    tokenizer: Tokenizer
    train: Dataset
    valid: Dataset  # evaluated during training: `held_out` of `train`
    test: Dataset  # measured before and after
    choices: list[Choice] | None
    files: dict[str, str]  # name -> SHA-256
    general: Dataset = field(default_factory=Dataset)

    @property
    def splits(self) -> dict[str, Dataset]:
        """Return the splits that have rows, by name, without the validation split where it is the test split."""
        found = {"training": self.train, "validation": self.valid, "held-out": self.test, "general": self.general}
        return {name: rows for name, rows in found.items() if rows and (name != "validation" or rows is not self.test)}


def read_data(
    settings: Settings,
    adapters: Sequence[Path],
    began: datetime,
    show: Callable[[str], None] | None = None,
) -> Data:
    """Read the rows of all splits and encode them as the model's tokenizer and the settings say.

    Args:
        settings: of the run.
        adapters: the adapter to start from, whose tokenizer comes first.
        began: the first start of the run, for templates that write the date.
        show: called with lines on the progress.

    Raises:
        DataError: a row cannot be used (with file and line), or there are no rows to train on.
    """
    run, config = settings.run, settings.data
    tokenizer = tokenizer_of(run.model, adapters) or load_tokenizer(run.model)
    tokenizer = tokenizer.with_tokens(run.add_tokens).at(began.astimezone())
    files = find_files(run.data, run.eval_data)
    tokenizer = use_prompt_style(tokenizer, config.prompt_style, stream_rows(*files["train"]))
    splits = hold_out(encode_files(files, tokenizer, config, show), run.eval_split, settings.training)
    general = load_general(run.general_data, tokenizer, config)
    choices = find_choices(splits["test"])
    return Data(tokenizer, **splits, choices=choices, files=hash_files(files), general=general)


def find_files(names: Sequence[str], eval_data: str | None = None) -> dict[str, list[Path]]:
    """Return the files of a run by split; those of `eval_data` are the test split.

    Raises:
        DataError: there is no training file; one of several files has the name of a split; or there are two test
            splits, or one that is trained on.
    """
    files = _training_files(names)
    if len(names) > 1 and (found := [path for path in files["train"] if is_named_held_out(path)]):
        raise DataError(f"{found[0]}: --data would train on it; give it as --eval-data, or under another name")
    if eval_data is not None:
        if "test" in files:
            raise DataError(f"{eval_data}: --data has a test split, {files['test'][0]}; leave --eval-data out")
        files["test"] = find_eval_files(eval_data)
        if both := {path.resolve() for path in files["test"]} & {path.resolve() for path in files["train"]}:
            raise DataError(f"{both.pop()}: is in --data and in --eval-data; rows that are trained on are not held out")
    return files


def encode_files(
    files: Mapping[str, Sequence[Path]],
    tokenizer: Tokenizer,
    config: DataConfig,
    show: Callable[[str], None] | None = None,
) -> dict[str, Dataset]:
    """Read and tokenize the rows of each split; `show` is called with lines on the progress."""
    return {split: encode_rows(stream_rows(*paths), tokenizer, config, show) for split, paths in files.items()}


def hold_out(splits: Mapping[str, Dataset], share: float, training: TrainConfig) -> dict[str, Dataset]:
    """Return the splits "train", "valid" and "test", for which a `share` of the training rows is held out if needed.

    Without test rows, rows are held out to measure the result; if the run selects the best adapter, others are to
    select it. Splits that the run does not tell apart are the same object.

    Raises:
        DataError: the run selects the best adapter, and there are no rows to do it with.
    """
    splits = dict(splits)
    needed = ["test"] if "valid" not in splits else []
    if training.selects:  # rows that select the adapter cannot also measure it
        needed = ["test", "valid"]
    missing = [split for split in needed if split not in splits]
    for i, split in enumerate(missing):
        whole = splits["train"]
        room = len(whole) - len(missing) + i  # a row stays to train on, and one for each split that follows
        if share and room > 0:
            shuffled = whole.rows[_shuffled(len(whole), training.seed)]
            held = min(max(1, int(share * len(shuffled))), room)
            splits["train"], splits[split] = replace(whole, rows=shuffled[held:]), whole.take(shuffled[:held])
    test = splits.get("test") or splits.get("valid") or Dataset()
    valid = splits.get("valid") or test
    if training.selects and not valid:
        raise DataError("keep best and early_stopping need held-out rows: see --eval-split and --eval-data")
    return {"train": splits["train"], "valid": valid, "test": test}


def _shuffled(count: int, seed: int) -> array[int]:
    """Return `random.Random(seed).sample(range(count), count)`, which takes 60 bytes a number."""
    draw, pool, found = random.Random(seed), array("q", range(count)), array("q")
    for left in range(count, 0, -1):
        chosen = draw.randrange(left)
        found.append(pool[chosen])
        pool[chosen] = pool[left - 1]
    return found


def load_general(name: str, tokenizer: Tokenizer, data_config: DataConfig) -> Dataset:
    """Read and tokenize general text, with a label on every token; "none" is an empty data set."""
    if name == "none":
        return Dataset()
    path = ASSETS / "data" / "general.jsonl" if name == BUILTIN else name
    rows = read_eval_rows(path)
    return encode_rows(rows, tokenizer, replace(data_config, train_on="all", system=None, text_field="text"))


def _training_files(names: str | Path | Sequence[str | Path]) -> dict[str, list[Path]]:
    """Return the files of a data set by split; raise a DataError if there are none to train on."""
    files = find_splits(names)
    if "train" not in files:
        shown = names if isinstance(names, str | Path) else ", ".join(map(str, names))
        raise DataError(f"{shown}: there are no training rows; found {sorted(files)}")
    return files


def hash_files(files: Mapping[str, Sequence[Path]]) -> dict[str, str]:
    """Return SHA-256 by file name, or by path where names repeat."""
    paths = [path for found in files.values() for path in found]
    is_distinct = len({path.name for path in paths}) == len(paths)
    return {(path.name if is_distinct else str(path)): sha256_of(path) for path in paths}


def find_splits(names: str | Path | Sequence[str | Path]) -> dict[str, list[Path]]:
    """Return the files of a data set by split.

    The splits of a directory are its files `train`, `valid` (or `validation`, `val`) and `test`. A file by itself, or
    the only one of a directory, is "train". Several names are joined.
    """
    found: dict[str, list[Path]] = {}
    for name in [names] if isinstance(names, str | Path) else names:
        for split, path in _splits_of(name).items():
            found.setdefault(split, []).append(path)
    return found


def _splits_of(name: str | Path) -> dict[str, Path]:
    path, found = fetch(name, "dataset"), dict[str, Path]()
    if not path.is_dir():
        return {"train": path}
    named = (file for file in path.iterdir() if file.name.endswith(DATA_ENDINGS) and file.name[0] != ".")
    files = sorted(file for file in named if file.is_file())
    for file in files:
        check_link(file)
        check_utf8("a file's name", file)
        stem = file.name.partition(".")[0]
        for split in (split for split, names in SPLITS.items() if stem in names):
            if split in found:
                raise DataError(f"{path}: {found[split].name} and {file.name} are both the {split} split; remove one")
            found[split] = file
    if not found and len(files) == 1:
        return {"train": files[0]}
    if not found:
        held = f"found {[file.name for file in files]}" if files else "found none"
        raise DataError(f"{path}: need one data file (*.jsonl, *.json, *.gz), or train.jsonl and perhaps more; {held}")
    return found


def is_named_held_out(path: Path) -> bool:
    """Return whether a word of a file's name is that of a split to evaluate on, as in `my_val.jsonl`."""
    return not HELD_OUT.isdisjoint(re.split("[^a-z]+", path.name.lower()))


def find_eval_files(names: str | Path | Sequence[str | Path]) -> list[Path]:
    """Return the files of the test split, else of the validation split, else of the training split."""
    files = find_splits(names)
    return next(files[split] for split in ("test", "valid", "train") if split in files)


def read_eval_rows(names: str | Path | Sequence[str | Path]) -> list[Row]:
    """Read the rows of `find_eval_files`."""
    return list(stream_rows(*find_eval_files(names)))


def stream_rows(*paths: Path) -> Iterator[Row]:
    """Yield the rows of files. A row that is not a JSON object has a `problem`; the caller refuses or skips it.

    A file of one object a line is not held in memory, an array is.
    """
    bad = 0
    for path in paths:
        chunks = read_chunks(path)
        first = next(chunks, b"").removeprefix(codecs.BOM_UTF8)
        if first.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise DataError(f"{path}: found UTF-16, need UTF-8")
        chunks, is_empty = itertools.chain([first], chunks), True
        is_array = first.lstrip()[:1] == b"["
        for row in _parse_array(b"".join(chunks), path) if is_array else _parse_lines(chunks, path):
            yield row
            is_empty = False
            if row.problem:
                bad += 1
            if bad > BAD_ROWS:
                raise DataError(f"{row.source}: this and {BAD_ROWS:,} before it are not rows; need {LAYOUTS}")
        if is_empty:
            raise DataError(f"{path}: there are no rows; need {LAYOUTS}")


def read_chunks(path: Path) -> Iterator[bytes]:
    """Yield the bytes of a file that the user named, decompressed if its name ends in `.gz`."""
    with open_file(path, is_named=True) as file:
        unpacked, total = gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file, 0
        try:
            while chunk := unpacked.read(CHUNK):
                yield chunk
                total += len(chunk)
                if total > UNPACKED + UNPACKED_TIMES * file.tell():
                    raise FormatError(f"{path}: more than {UNPACKED_TIMES} times as large as what it is packed into")
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise FormatError(f"{path}: not gzip, or damaged ({error})") from error
        except OSError as error:
            raise FormatError(f"{path}: cannot be read ({error.strerror})") from error


def _parse_lines(chunks: Iterable[bytes], path: Path) -> Iterator[Row]:
    number, line = 0, b""
    for chunk in itertools.chain(chunks, [b"\n"]):
        *lines, line = (line + chunk).split(b"\n")
        for i, each in enumerate(lines, start=number + 1):
            if each.strip():
                yield _parse_line(each, f"{path}:{i}")
        number += len(lines)
        if len(line) > LINE_BYTES:
            raise DataError(f"{path}:{number + 1}: the row has more than {LINE_BYTES:,} bytes")


def _parse_line(line: bytes, source: str) -> Row:
    if line.startswith(codecs.BOM_UTF8):
        return Row(source=source, problem="found a byte order mark, which is accepted only at the beginning of a file")
    if sum(map(line.count, (b",", b"[", b"{"))) > JSON_VALUES:
        return Row(source=source, problem=f"has more than {JSON_VALUES:,} values")
    try:
        return _as_row(json.loads(line.decode("utf-8")), source)
    except (ValueError, RecursionError) as error:
        return Row(source=source, problem=_problem_of(error, f"; need {LAYOUTS}"))


def _parse_array(data: bytes, path: Path) -> Iterator[Row]:
    """Yield the elements of a JSON array, each with the line that it begins on."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: {_problem_of(error)}") from error
    decoder, position, white = json.JSONDecoder(), text.index("[") + 1, " \t\r\n"
    line, counted, separators = 1, 0, 0
    while True:
        begin = position
        while position < len(text) and text[position] in white + ",":
            position += 1
        line, counted = line + text.count("\n", counted, position), position
        is_end = text[position : position + 1] == "]" and not text[position + 1 :].strip()
        if text.count(",", begin, position) != (0 if is_end else separators):
            raise DataError(f"{path}:{line}: not JSON: before this, a comma or bracket is missing or one too many")
        if is_end:
            return
        separators = 1
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            line = getattr(error, "lineno", line)  # that of the error, and not of the element
            raise DataError(f"{path}:{line}: {_problem_of(error)}") from error
        yield _as_row(value, f"{path}:{line}")


def _as_row(value: Any, source: str) -> Row:
    if not isinstance(value, dict):
        return Row(source=source, problem=f"found {value!r:.60}, need a JSON object")
    return Row(value, source)


def _problem_of(error: ValueError | RecursionError, advice: str = "") -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.object[error.start]:#04x} at {error.start} is not UTF-8"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg.removesuffix(' at')} at column {error.colno}{advice}"
    return "nested too deeply" if isinstance(error, RecursionError) else "a number has too many digits"
