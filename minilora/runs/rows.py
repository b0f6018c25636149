"""Data files as rows, each of which knows the line that it begins on.

A file holds a JSON array of objects or one object a line, distinguished by its first character. A byte order mark at
its beginning is accepted; lines end in LF or CRLF.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from minilora.errors import DataError, FormatError
from minilora.files import JSON_VALUES, open_file
from minilora.runs.formats import Row

LINE_BYTES = 2**23  # of one row; a long book has 2 MB
LAYOUTS = "one JSON object a line, or one array of them"
OPENING = re.compile(r"\s*(\[(?:\s*\])?)\s*")  # of an array, or all of an empty one
SEPARATOR = re.compile(r"\s*(,|\]\s*\Z)\s*")  # after an element


def stream_rows(*paths: Path) -> Iterator[Row]:
    """Yield the rows of files. A row that is not a JSON object has a `problem`; the caller refuses or skips it.

    A file of one object a line is not held in memory, an array is.
    """
    for path in paths:
        is_empty = True
        try:
            for row in _parse(path):
                is_empty = False
                yield row
        except OSError as error:
            raise FormatError(f"{path}: cannot be read ({error.strerror})") from error
        if is_empty:
            raise DataError(f"{path}: there are no rows; need {LAYOUTS}")


def _parse(path: Path) -> Iterator[Row]:
    with open_file(path, is_named=True) as file:
        if file.peek().startswith(codecs.BOM_UTF8):
            file.read(len(codecs.BOM_UTF8))
        begin = file.peek()
        if begin.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise DataError(f"{path}: found UTF-16, need UTF-8")
        is_array = begin.lstrip().startswith(b"[")
        yield from _parse_array(file, path) if is_array else _parse_lines(file, path)


def _parse_lines(file: IO[bytes], path: Path) -> Iterator[Row]:
    number = 0
    while line := file.readline(LINE_BYTES + 1):
        number += 1
        if len(line) > LINE_BYTES:
            raise DataError(f"{path}:{number}: the row has more than {LINE_BYTES:,} bytes")
        if line.strip():
            yield _parse_line(line, f"{path}:{number}")


def _parse_line(line: bytes, source: str) -> Row:
    if sum(map(line.count, (b",", b"[", b"{"))) > JSON_VALUES:
        return Row(source=source, problem=f"has more than {JSON_VALUES:,} values")
    try:
        return _as_row(json.loads(line.decode("utf-8")), source)
    except (ValueError, RecursionError) as error:
        return Row(source=source, problem=f"{_problem_of(error)}; need {LAYOUTS}")


def _parse_array(file: IO[bytes], path: Path) -> Iterator[Row]:
    decoder, line, counted, where = json.JSONDecoder(), 1, 0, str(path)
    try:
        text = file.read().decode("utf-8")
        separator = OPENING.match(text)
        assert separator is not None  # the first character is a bracket
        while separator[1] in "[,":
            begin = separator.end()
            line += text.count("\n", counted, begin)
            counted, where = begin, f"{path}:{line}"
            value, end = decoder.raw_decode(text, begin)
            yield _as_row(value, where)
            separator = SEPARATOR.match(text, end)
            if separator is None:
                raise json.JSONDecodeError("need a comma or the closing bracket", text, end)
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError):
            where = f"{path}:{error.lineno}"
        raise DataError(f"{where}: {_problem_of(error)}") from error


def _as_row(value: Any, source: str) -> Row:
    if not isinstance(value, dict):
        return Row(source=source, problem=f"found {value!r:.60}, need a JSON object")
    return Row(value, source)


def _problem_of(error: ValueError | RecursionError) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.object[error.start]:#04x} at {error.start} is not UTF-8"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg.removesuffix(' at')} at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else "a number has too many digits"
