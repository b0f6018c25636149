"""Encoded rows as arrays: in memory or, of large files, on the disk, where all processes of a machine share them.

    DIRECTORY/tokens.bin  labels.bin   of all rows, end to end, as int32
              rows.bin                 a `ROW` of each row: where it lies in them, and where it was read
              counts.json              the counts of `Dataset`
              minilora-manifest.json   sizes and hashes of all these

Rows are read as a stream. Those of large files are encoded by processes, a part of the stream each; the order is kept.
"""

from __future__ import annotations

import mmap
import os
import signal
import sys
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from io import BytesIO
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Protocol, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from minilora.data import Example
from minilora.durable import read_manifest, replacing, verify, write_json
from minilora.errors import DataError, FormatError, TrainingError
from minilora.runs import world
from minilora.runs.config import DataConfig
from minilora.runs.formats import Row
from minilora.storage import BAD_ROWS, read_json

T = TypeVar("T")
INT32 = np.dtype("<i4")
ROW = np.dtype(
    [("begin", "<i8"), *((name, INT32) for name in ("length", "labelled", "largest", "file", "line"))]
)  # largest: of the ids in it; file: an index; line: -1 if the source of the row names none
ARRAYS = ("tokens", "labels", "rows")
PART = 500  # rows that are encoded at a time
PROCESSES = 16  # at most: one process reads for all, and each takes 300 MB


class MappedFile:
    """A file, of which a slice is mapped while it is read: a mapping of all would hold in memory what was read.

    It may be removed from its directory meanwhile.
    """

    def __init__(self, path: Path):
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)

    def __getitem__(self, index: slice) -> bytes:
        begin = index.start - index.start % mmap.ALLOCATIONGRANULARITY
        with mmap.mmap(self._file, index.stop - begin, access=mmap.ACCESS_READ, offset=begin) as mapped:
            return mapped[index.start - begin :]


@dataclass(frozen=True, repr=False, eq=False)
class Dataset(Sequence[Example]):
    """A sequence of tokenized rows, and counts of what was changed or dropped.

    `truncated` rows were cut to `max_length`, which removed `lost` labels; `unlabelled` rows had none left and were
    dropped, as were rows that cannot be used: `bad` has an error message for each. `conversations` are rows rendered
    by a chat template, `completions` those of a prompt and a completion as plain text, of which `touching` have no
    white space between the two; `quoted` are rows whose control tokens are encoded as plain text.

    `tokens` and `labels` hold the numbers of all rows, and more; `rows` says where those of each row lie. `digest` is
    a hash of both if they are files.
    """

    tokens: bytes | MappedFile = b""
    labels: bytes | MappedFile = b""
    rows: NDArray[Any] = field(default_factory=lambda: np.empty(0, ROW))
    files: tuple[str, ...] = ()
    digest: str = ""
    truncated: int = 0
    unlabelled: int = 0
    lost: int = 0
    bad: tuple[str, ...] = ()
    conversations: int = 0
    completions: int = 0
    touching: int = 0
    quoted: int = 0

    def __repr__(self) -> str:
        counts = f"{self.truncated} truncated, {self.unlabelled} unlabelled, {len(self.bad)} bad"
        return f"Dataset({len(self)} rows, {self.lengths.sum()} tokens, {counts})"

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Dataset: ...
    def __getitem__(self, index: int | slice) -> Example | Dataset:
        if isinstance(index, slice):
            return self.take(self.rows[index])
        begin, length, _, _, file, line = self.rows[index].item()
        span = slice(begin * INT32.itemsize, (begin + length) * INT32.itemsize)
        tokens, labels = (np.frombuffer(held[span], INT32).tolist() for held in (self.tokens, self.labels))
        return Example(tokens, labels, self.files[file] + (f":{line}" if line >= 0 else ""))

    def take(self, rows: NDArray[Any]) -> Dataset:
        """Return a data set of some of the `rows`, in their order, without the counts."""
        return Dataset(self.tokens, self.labels, rows, self.files, self.digest)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """The number of tokens of each row."""
        return self.rows["length"].astype(np.int64)

    @property
    def labelled(self) -> NDArray[np.int64]:
        """The number of labels of each row that are learned."""
        return self.rows["labelled"].astype(np.int64)


def lengths_of(examples: Sequence[Example]) -> NDArray[np.int64]:
    """Return the number of tokens of each example."""
    return examples.lengths if isinstance(examples, Dataset) else np.array([len(each.tokens) for each in examples], int)


def sizes_of(examples: Sequence[Example]) -> NDArray[Any]:
    """Return the numbers of tokens and of learned labels of each example, (rows, 2)."""
    if isinstance(examples, Dataset):
        return np.column_stack([examples.rows["length"], examples.rows["labelled"]])
    return np.array([(len(each.tokens), each.labelled) for each in examples], INT32).reshape(-1, 2)


class Encoder(Protocol):
    """A function of a row that returns an example, and the names of the counts of `Dataset` that it adds to.

    `key` is what the examples follow from, besides the rows.
    """

    @property
    def config(self) -> DataConfig: ...
    @property
    def key(self) -> str: ...
    def __call__(self, row: Row) -> tuple[Example, Iterable[str]]: ...


def usable(rows: Iterable[Row], function: Callable[[Row], T], skips_bad: bool, bad: list[str]) -> Iterator[T]:
    """Yield the results of a function for all rows; append an error message to `bad` for each that is skipped."""
    for row in rows:
        try:
            if row.problem:
                raise DataError(row.problem)
            found = function(row)
        except DataError as error:
            bad.append(f"{row.source}: {error}")
            if not skips_bad or len(bad) > BAD_ROWS:
                raise DataError(bad[-1]) from error
        else:
            yield found


@dataclass(frozen=True)
class Part:
    """Consecutive rows, encoded; `begin` and `file` of its `rows` count from 0 in each part."""

    tokens: bytes
    labels: bytes
    rows: NDArray[Any]
    files: tuple[str, ...]
    counts: Counter[str]
    bad: list[str]
    first: str  # the source of the first row
    last: str


def encode_part(rows: Sequence[Row], encode: Encoder) -> Part:
    """Encode rows, cut them to the maximum length, and drop those without a label."""
    tokens, labels, kept = list[int](), list[int](), list[tuple[int, ...]]()
    limit, counts, bad, files = encode.config.max_length, Counter[str](), list[str](), dict[str, int]()
    for whole, names in usable(rows, encode, encode.config.skip_bad_rows, bad):
        cut = replace(whole, tokens=whole.tokens[:limit], labels=whole.labels[:limit])
        labelled = cut.labelled
        counts.update(names)
        if len(whole.tokens) > limit:
            counts.update(truncated=1, lost=whole.labelled - labelled)
        if not labelled:
            counts["unlabelled"] += 1
            continue
        file, line = _split(whole.source)
        largest = max(*cut.tokens, *cut.labels)
        kept.append((len(tokens), len(cut.tokens), labelled, largest, files.setdefault(file, len(files)), line))
        tokens += cut.tokens
        labels += cut.labels
    arrays = np.array(tokens, INT32).tobytes(), np.array(labels, INT32).tobytes(), np.array(kept, ROW)
    return Part(*arrays, tuple(files), counts, bad, rows[0].source, rows[-1].source)


def _split(source: str) -> tuple[str, int]:
    """Return the file and the line of "file:line"; of another source all of it, and -1."""
    file, _, line = source.rpartition(":")
    return (file, int(line)) if line.isdecimal() and str(int(line)) == line else (source, -1)


_encoder: Encoder  # of a process that encodes parts


def _begin(encode: Encoder) -> None:
    global _encoder
    _encoder = encode
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # which the process that reads gets, too


def _encode(rows: Sequence[Row]) -> Part:
    return encode_part(rows, _encoder)


def _parts(rows: Iterable[Row], encode: Encoder, is_parallel: bool) -> Iterator[Part]:
    """Yield the rows in encoded parts, in their order."""
    stream = iter(rows)
    pieces = iter(lambda: list(islice(stream, PART)), [])
    if not is_parallel:
        yield from (encode_part(piece, encode) for piece in pieces)
        return
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    count, waiting = min(cores, PROCESSES), deque[Any]()
    try:
        with ProcessPoolExecutor(count, get_context("spawn"), _begin, (encode,)) as pool:
            for piece in pieces:
                waiting.append(pool.submit(_encode, piece))
                if len(waiting) > 2 * count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise TrainingError("a process that encoded rows was ended from outside; memory may have run out") from error


def build_dataset(
    rows: Iterable[Row], encode: Encoder, directory: Path | None = None, report: Callable[[str], None] | None = None
) -> Dataset:
    """Encode rows into arrays in memory or, by several processes, into files of a directory.

    `report` is called with the source of the row up to which all is done.
    """
    counts, bad, files, first, size = Counter[str](), list[str](), dict[str, int](), "", 0
    with ExitStack() as stack:
        names = [] if directory is None else [directory / f"{name}.bin" for name in ARRAYS]
        sinks: list[Any] = [stack.enter_context(name.open("wb")) for name in names] or [BytesIO() for _ in ARRAYS]
        for part in _parts(rows, encode, directory is not None):
            if len(part.rows):
                part.rows["begin"] += size
                part.rows["file"] = np.array([files.setdefault(f, len(files)) for f in part.files])[part.rows["file"]]
            for sink, content in zip(sinks, (part.tokens, part.labels, part.rows.tobytes()), strict=True):
                sink.write(content)
            first, size = first or part.first, size + len(part.tokens) // INT32.itemsize
            counts += part.counts
            bad += part.bad
            if len(bad) > BAD_ROWS:
                raise DataError(bad[BAD_ROWS])
            if report:
                report(part.last)
        if not size:
            total, limit = counts["unlabelled"] + len(bad), encode.config.max_length
            skipped = f"; {len(bad)} were skipped, the first: {bad[0]}" if bad else ""
            raise DataError(f"{first}: no row of {total} has a label within its first {limit} tokens{skipped}")
        values: dict[str, Any] = {"files": tuple(files), "bad": tuple(bad), **counts}
        if directory is None:
            tokens, labels, found = (sink.getvalue() for sink in sinks)
            return Dataset(tokens, labels, np.frombuffer(found, ROW), **values)
    write_json(directory / "counts.json", values)
    return open_dataset(directory)


def open_dataset(directory: Path) -> Dataset:
    """Map the files of `build_dataset`."""
    values = read_json(directory / "counts.json")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    tokens, labels = (MappedFile(directory / f"{name}.bin") for name in ("tokens", "labels"))
    return Dataset(tokens, labels, np.fromfile(directory / "rows.bin", ROW), **values)


def cached_dataset(folder: Path, key: str, write: Callable[[Path], Any]) -> Dataset:
    """Open the data set that a folder, or the same one of a run beside it, keeps under a key; or write it there.

    A directory that is not as it was written is not used. Of several ranks, the first decides and writes.
    """
    own = folder / key

    def find_or_write() -> Path:
        for found in (own, *sorted(folder.parent.parent.glob(f"*/{folder.name}/{key}"))):
            if _is_whole(found):
                return found
        with replacing(own) as temporary:
            temporary.mkdir(exist_ok=True)  # one of a killed process of the same number
            write(temporary)
        return own

    found = world.from_first(find_or_write)
    files = read_manifest(found)
    digest = " ".join(files[f"{name}.bin"]["sha256"] for name in ARRAYS[:2])
    return replace(open_dataset(found), digest=digest)


def _is_whole(directory: Path) -> bool:
    """Return whether a directory is ours, and as it was written."""
    try:
        verify(directory, [*(f"{name}.bin" for name in ARRAYS), "counts.json"])
        return sys.platform == "win32" or directory.stat().st_uid == os.getuid()  # others may write beside a run, too
    except (FormatError, OSError):
        return False
