"""Data files as rows, each of which knows where it is from: FILE:LINE, or FILE[INDEX] in an array of JSON.

    .csv, .tsv      a row a line, or several with quotes, as Python's `csv` reads them; the first row names the columns
    .txt            a document, which is one row
    other endings   an array of JSON objects, or one object a line; the first character decides

Files are in UTF-8. A byte order mark at the beginning is accepted; lines end in LF or CRLF.
"""

import codecs
import csv
import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from io import BufferedReader
from pathlib import Path

from minilora.errors import DataError, FormatError
from minilora.files import open_file, parse_object, read_text
from minilora.runs.formats import Row

LINE_BYTES = 2**23  # of one row; a long book has 2 MB
TABLE_BYTES = 2**21  # of a row of CSV, in which a cell has at most 131,072 characters and takes 8 bytes or more
LAYOUTS = "a file has one JSON object a line, or one array of them"
TABLE = (
    'CSV in UTF-8 (from Excel: save as "CSV UTF-8"), with double quotes around text that has separators, quotes or '
    "line breaks"
)
PARQUET = """is Parquet, which is not read; these lines of Python (pip install pandas pyarrow) convert it:
  import pandas
  pandas.read_parquet({!r}).to_json({!r}, orient="records", lines=True)"""


def stream_rows(*paths: Path, columns: Mapping[str, str] | None = None) -> Iterator[Row]:
    """Yield the rows of files. A row that cannot be read has a `problem`; the caller refuses or skips it.

    `columns` are the fields of a row, and what they are called in the files; None: all, as they are called there.
    """
    for path in paths:
        is_empty = True
        try:
            for row in _parse(path):
                is_empty = False
                yield row if columns is None else _select(row, columns)
        except OSError as error:
            raise FormatError(f"{path}: cannot be read ({error.strerror})") from error
        if is_empty:
            raise DataError(f"{path}: there are no rows")


def _select(row: Row, columns: Mapping[str, str]) -> Row:
    missing = {column: name for name, column in columns.items() if column not in row.fields}
    if missing and row.fields.keys() >= {"prompt", "wanted", *columns}:
        return row  # of a run's held_out.jsonl, which has the names already
    if missing:
        column, name = min(missing.items())
        close = difflib.get_close_matches(column, row.fields, n=1)
        advice = f"did you mean {close[0]!r}?" if close else f"found {sorted(row.fields)!s:.200}"
        return replace(row, problem=row.problem or f"columns {name}={column}: there is no column {column!r}; {advice}")
    return replace(row, fields={name: row.fields[column] for name, column in columns.items()})


def _parse(path: Path) -> Iterator[Row]:
    kind = path.suffix.lower()
    if kind == ".txt":
        yield Row({"text": read_text(path, LINE_BYTES, is_named=True).removeprefix("\ufeff")}, str(path))
        return
    with open_file(path, is_named=True) as file:
        if file.peek().startswith(codecs.BOM_UTF8):
            file.read(len(codecs.BOM_UTF8))
        begin = file.peek()
        if begin.startswith(b"PAR1"):
            raise DataError(f"{path}: {PARQUET.format(str(path), str(path.with_suffix('.jsonl')))}")
        if begin.startswith(b"PK"):
            raise DataError(f"{path}: is an archive or a workbook, not text; save a table as CSV")
        if kind in (".csv", ".tsv"):
            yield from _parse_table(file, path)
        elif begin.lstrip().startswith(b"["):
            yield from _parse_array(file, path)
        else:
            yield from _parse_lines(file, path)


def _parse_table(file: BufferedReader, path: Path) -> Iterator[Row]:
    """Yield the rows of CSV or TSV; where commas are decimal points, Excel separates cells by semicolons."""
    header = file.peek().partition(b"\n")[0]
    separator = ";" if header.count(b";") > header.count(b",") else ","
    size, begin, names = 0, 1, list[str]()  # of the row: its bytes so far, and its first line

    def lines() -> Iterator[str]:
        nonlocal size
        while line := file.readline(TABLE_BYTES + 1):
            size += len(line)
            if size > TABLE_BYTES:
                raise csv.Error(f"the row has more than {TABLE_BYTES:,} bytes")
            yield line.decode("utf-8")

    reader = csv.reader(lines(), delimiter="\t" if path.suffix.lower() == ".tsv" else separator, strict=True)
    try:
        for cells in reader:
            source = f"{path}:{begin}"
            begin = reader.line_num + 1
            size = 0
            filled = [cell for cell in cells if cell]
            if not filled:
                continue
            if not names:
                names = cells
                if len({*filled}) < len(filled):
                    raise DataError(f"{source}: the first row has to name the columns, each once; found {cells!s:.80}")
            elif len(cells) == len(names):
                yield Row(dict(zip(names, cells, strict=True)), source)
            else:
                problem = (
                    f"found {len(cells)} cells, need {len(names)}, as in the first row; put text with commas in quotes"
                )
                yield Row(source=source, problem=problem)
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path}:{begin}: {error}; need {TABLE}") from error


def _parse_lines(file: BufferedReader, path: Path) -> Iterator[Row]:
    number = 0
    while line := file.readline(LINE_BYTES + 1):
        number += 1
        source = f"{path}:{number}"
        if len(line) > LINE_BYTES:
            raise DataError(f"{source}: the row has more than {LINE_BYTES:,} bytes")
        if line.strip():
            try:
                yield Row(parse_object(line, "this line"), source)
            except FormatError as error:
                yield Row(source=source, problem=f"{error}; {LAYOUTS}")


def _parse_array(file: BufferedReader, path: Path) -> Iterator[Row]:
    try:
        values = json.loads(file.read().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({error})") from error
    for i, value in enumerate(values):
        problem = "" if isinstance(value, dict) else f"found {value!r:.60}, need a JSON object"
        yield Row({} if problem else value, f"{path}[{i}]", problem)
