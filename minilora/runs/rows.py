"""Data files: the splits of a data set, and rows with the file and line that they were read from.

A file holds a JSON array of objects or one object a line, distinguished by its first character, and may be compressed
(`.gz`). A byte order mark at its beginning is accepted; lines end in LF or CRLF.
"""

from __future__ import annotations

import codecs
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minilora.errors import DataError
from minilora.limits import BAD_ROWS, JSON_VALUES, LINE_BYTES, check_link
from minilora.models.hub import DATA_ENDINGS, fetch
from minilora.storage import read_chunks

LAYOUTS = "one JSON object a line, or one array of them"
SPLITS = {"train": ("train",), "valid": ("valid", "validation", "val"), "test": ("test",)}  # names of their files
HELD_OUT = {*SPLITS["valid"], *SPLITS["test"], "dev", "eval"}


@dataclass(frozen=True)
class Row:
    """A row as it was read; `source` is "file:line", and `problem` is why there are no fields, if there are none."""

    fields: dict[str, Any] = field(default_factory=dict)
    source: str = ""
    problem: str = ""


def find_splits(names: str | Path | Sequence[str | Path]) -> dict[str, list[Path]]:
    """Return the files of a data set by split.

    The splits of a directory are its files `train`, `valid` (or `validation`, `val`) and `test`. A file by itself, or
    the only one of a directory, is "train". Several names are joined.

    Raises:
        FormatError: there is no such file, directory or repository.
        DataError: a directory without data files, or with two for one split.
    """
    found: dict[str, list[Path]] = {}
    for name in [names] if isinstance(names, str | Path) else names:
        for split, path in _splits_of(name).items():
            found.setdefault(split, []).append(path)
    return found


def _splits_of(name: str | Path) -> dict[str, Path]:
    path = fetch(name, "dataset")
    if not path.is_dir():
        return {"train": path}
    named = (file for file in path.iterdir() if file.name.endswith(DATA_ENDINGS) and file.name[0] != ".")
    files = sorted(file for file in named if file.is_file())
    for file in files:
        check_link(file)
    found: dict[str, Path] = {}
    for file in files:
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
    return read_rows(*find_eval_files(names))


def read_rows(*paths: Path) -> list[Row]:
    """Read the rows of `stream_rows`."""
    return list(stream_rows(*paths))


def stream_rows(*paths: Path) -> Iterator[Row]:
    """Yield the rows of files. A row that is not a JSON object has a `problem`; the caller refuses or skips it.

    A file of one object a line is not held in memory, an array is.

    Raises:
        FormatError: a file cannot be read.
        DataError: a file has no rows, is a malformed JSON array, or is UTF-16.
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
            is_empty, bad = False, bad + bool(row.problem)
            if bad > BAD_ROWS:
                raise DataError(f"{row.source}: this and {BAD_ROWS:,} before it are not rows; need {LAYOUTS}")
        if is_empty:
            raise DataError(f"{path}: there are no rows; need {LAYOUTS}")


def holds_word(path: Path, word: bytes) -> bool:
    """Return whether a file holds a word as it is, without escapes."""
    before = b""
    for chunk in read_chunks(path):
        if word in before + chunk:
            return True
        before = (before + chunk)[-len(word) :]
    return False


def count_lines(path: Path) -> int:
    """Count the lines of a file, the last one also where no newline ends it."""
    count, last = 0, b"\n"
    for last in read_chunks(path):
        count += last.count(b"\n")
    return count + (last[-1:] != b"\n")


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
    except UnicodeDecodeError as error:
        return Row(source=source, problem=_not_utf8(error))
    except (ValueError, RecursionError) as error:
        return Row(source=source, problem=_not_json(error, f"; need {LAYOUTS}"))


def _parse_array(data: bytes, path: Path) -> Iterator[Row]:
    """Yield the elements of a JSON array, each with the line that it begins on."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: {_not_utf8(error)}") from error
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
            raise DataError(f"{path}:{line}: {_not_json(error)}") from error
        yield _as_row(value, f"{path}:{line}")


def _as_row(value: Any, source: str) -> Row:
    if not isinstance(value, dict):
        return Row(source=source, problem=f"found {value!r:.60}, need a JSON object")
    return Row(value, source)


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"byte {error.object[error.start]:#04x} at {error.start} is not UTF-8"


def _not_json(error: ValueError | RecursionError, advice: str = "") -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg.removesuffix(' at')} at column {error.colno}{advice}"
    return "nested too deeply" if isinstance(error, RecursionError) else "a number has too many digits"
