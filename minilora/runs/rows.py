"""Data files as rows, each of which knows the line that it begins on.

A file holds a JSON array of objects or one object a line, distinguished by its first character, and may be compressed
(`.gz`). A byte order mark at its beginning is accepted; lines end in LF or CRLF.
"""

from __future__ import annotations

import codecs
import gzip
import itertools
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from minilora.errors import DataError, FormatError
from minilora.files import JSON_VALUES, open_file
from minilora.runs.formats import Row

LINE_BYTES = 2**23  # of one row; a long book has 2 MB
CHUNK = 2**20  # bytes that are read at a time
UNPACKED, UNPACKED_TIMES = 2**20, 50  # bytes of a .gz file, and more for each compressed byte; text has 3 to 20
LAYOUTS = "one JSON object a line, or one array of them"
OPENING = re.compile(r"\s*(\[(?:\s*\])?)\s*")  # of an array, or all of an empty one
SEPARATOR = re.compile(r"\s*(,|\]\s*\Z)\s*")  # after an element


def stream_rows(*paths: Path) -> Iterator[Row]:
    """Yield the rows of files. A row that is not a JSON object has a `problem`; the caller refuses or skips it.

    A file of one object a line is not held in memory, an array is.
    """
    for path in paths:
        chunks = _read_chunks(path)
        first = next(chunks, b"").removeprefix(codecs.BOM_UTF8)
        if first.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise DataError(f"{path}: found UTF-16, need UTF-8")
        content = itertools.chain([first], chunks)
        is_array, is_empty = first.lstrip()[:1] == b"[", True
        for row in _parse_array(b"".join(content), path) if is_array else _parse_lines(content, path):
            is_empty = False
            yield row
        if is_empty:
            raise DataError(f"{path}: there are no rows; need {LAYOUTS}")


def _read_chunks(path: Path) -> Iterator[bytes]:
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
    if sum(map(line.count, (b",", b"[", b"{"))) > JSON_VALUES:
        return Row(source=source, problem=f"has more than {JSON_VALUES:,} values")
    try:
        return _as_row(json.loads(line.decode("utf-8")), source)
    except (ValueError, RecursionError) as error:
        return Row(source=source, problem=f"{_problem_of(error)}; need {LAYOUTS}")


def _parse_array(content: bytes, path: Path) -> Iterator[Row]:
    decoder, line, counted, where = json.JSONDecoder(), 1, 0, str(path)
    try:
        text = content.decode("utf-8")
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
