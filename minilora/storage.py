"""Reading files from outside, which may hold anything: text, JSON and safetensors, never a pickle.

A file states sizes: of a tensor, a vocabulary, a list. Memory and time may grow with the bytes that are there, but not
with a number that they state, so a stated number is compared with what is there, or with a limit of this page, before
anything is allocated. A file that cannot be read raises a `FormatError` that names it.
"""

from __future__ import annotations

import gzip
import json
import math
import re
import stat
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minilora.errors import FormatError

BUILTIN = "minilora/builtin"
ASSETS = Path(__file__).parent / "assets"
KINDS = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
CHUNK = 2**20  # bytes of a data file that are read at a time
DTYPES = {  # by their names in a safetensors file
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
SHARD_BYTES = 5_000_000_000
INDEX = "model.safetensors.index.json"
MODEL_FILES = ("config.json", INDEX, "model.safetensors", "model-*-of-*.safetensors")

# Limits
JSON_BYTES = 2**24  # of a JSON or text file; the index of 100,000 tensors has 10 MB
JSON_VALUES = 10**6  # in it: a value takes 80 bytes of memory, and as little as 3 in the file
TOKENIZER_BYTES, TOKENIZER_VALUES = 2**27, 10**7  # of a tokenizer.json; that of 262,144 tokens has 33 MB, 2.4 million
RECORDS_BYTES = 2**30  # of metrics.jsonl; a step has 200
LINE_BYTES = 2**23  # of one row of data; a long book has 2 MB
BAD_ROWS = 50_000  # that are skipped and kept with their reasons
UNPACKED, UNPACKED_TIMES = 2**20, 50  # bytes of a .gz file, and more for each compressed byte; text has 3 to 20
DIMENSIONS, ELEMENTS = 16, 2**48  # of a tensor, with a dimension of 0 counted as 1: PyTorch has 64 and 2**63
MAX_NAMES = 10_000  # of modules, in one key of an adapter's config: each is compared with each module
GROWTH = 1024  # rows of a vocabulary that the tokens of an adapter may add, beside as many as there are
SIZES = {  # the largest of each key in config.json, where the weights do not say
    **dict.fromkeys(("vocab_size", "intermediate_size"), 2**24),
    **dict.fromkeys(("hidden_size", "head_dim"), 2**18),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads"), 2**12),
    "num_hidden_layers": 160,  # Llama 3.1 405B has 126
}
COUNT, FLOAT = 2**31 - 1, 1e30  # the largest other whole number, and the largest other number, in config.json
WEIGHT = 1e6  # of an adapter in a sum


def open_file(path: Path, most: int | None = None, is_named: bool = False) -> BufferedReader:
    """Open a file to read its bytes; `is_named` says that the user named it, and not a directory that it lies in.

    Raises:
        FormatError: there is no such file; it is a directory, a device, a FIFO or a socket, whose reading might never
            end; it is a link that `check_link` refuses; or it has more than `most` bytes.
    """
    try:
        if not is_named:
            check_link(path)
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise FormatError(f"{path}: cannot be read (it is {KINDS.get(stat.S_IFMT(found.st_mode), 'a device')})")
        if most is not None and found.st_size > most:
            raise FormatError(f"{path}: has {found.st_size:,} bytes; at most {most:,} are accepted")
        return path.open("rb")
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror})") from error


def check_link(path: Path) -> None:
    """Raise a `FormatError` if a file is a link out of its directory, unless to `blobs`, as in the cache of the hub."""
    if path.is_symlink():
        try:
            target, home = path.resolve(), path.parent.resolve()
        except (OSError, RuntimeError) as error:
            raise FormatError(f"{path}: is a link to itself") from error
        if not (target.is_relative_to(home) or target.is_relative_to(home.parent.parent / "blobs")):
            raise FormatError(f"{path}: is a link to {target}, outside its directory, which is not followed")


def parse_json(text: str | bytes, where: str, most: int = JSON_VALUES) -> Any:
    """Parse JSON of at most `most` values, or raise a `FormatError` whose message begins with `where`."""
    try:
        text = text if isinstance(text, str) else text.decode()
        if sum(map(text.count, (",", "[", "{"))) > most:
            raise ValueError(f"more than {most:,} values")
        value = json.loads(text)
        if re.search(r"\\u[dD][89a-fA-F]", text):  # a half of a surrogate pair, perhaps, which no text may hold
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{where}: not JSON ({error})") from error


def read_text(path: Path, most: int = JSON_BYTES, is_named: bool = False) -> str:
    """Return the text of a UTF-8 file of at most `most` bytes; for `is_named` see `open_file`."""
    with open_file(path, most, is_named) as file:
        try:
            return file.read().decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
        except UnicodeDecodeError as error:
            raise FormatError(f"{path}: byte {error.start} is not UTF-8") from error
        except OSError as error:
            raise FormatError(f"{path}: cannot be read ({error.strerror})") from error


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


def read_json(path: Path, is_named: bool = False) -> dict[str, Any]:
    """Return the JSON object in a file."""
    value = parse_json(read_text(path, is_named=is_named), str(path))
    if not isinstance(value, dict):
        raise FormatError(f"{path}: found a JSON {type(value).__name__}, need an object")
    return value


@dataclass(frozen=True)
class TensorEntry:
    """The header's entry of a tensor: its dtype as the file spells it (BF16, F32, …), its shape and its size."""

    dtype: str
    shape: tuple[int, ...]
    bytes: int


class TensorFile:
    """A safetensors file, whose header is read at once, and a tensor only when it is asked for."""

    def __init__(self, path: Path):
        self.path = path
        with open_file(path) as file:
            size = int.from_bytes(file.read(8), "little")
            text = file.read(min(size, JSON_BYTES + 1))
        if len(text) > JSON_BYTES:
            raise FormatError(f"{path}: not a safetensors file (a header of {size:,} bytes)")
        header = parse_json(text, f"{path}: not a safetensors file")
        try:
            # `safe_open` checks that sizes fit dtypes and shapes, without gaps. For PyTorch, it would map the file.
            with safe_open(path, framework="numpy"):
                self._bytes = path.stat().st_size
            self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
            self._spans = {name: [8 + size + at for at in header[name]["data_offsets"]] for name in sorted(header)}
            self.entries = {
                name: TensorEntry(header[name]["dtype"], tuple(header[name]["shape"]), end - begin)
                for name, (begin, end) in self._spans.items()
            }
        except (OSError, SafetensorError, TypeError) as error:  # TypeError: an entry that is a list
            raise FormatError(f"{path}: not a safetensors file ({error})") from error
        self.shapes = {name: entry.shape for name, entry in self.entries.items()}
        for name, shape in self.shapes.items():
            if len(shape) > DIMENSIONS or math.prod(max(size, 1) for size in shape) > ELEMENTS:
                raise FormatError(f"{path}: {name:.80} has the shape {shape!s:.80}, which no tensor can have")

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor."""
        stored = self.entries[name].dtype
        if stored not in DTYPES:
            raise FormatError(f"{self.path}: {name} cannot be read: it is {stored}; supported are {list(DTYPES)}")
        return DTYPES[stored]

    def read(self, name: str) -> Tensor:
        """Return a tensor as a view of the mapped file: copy it before the file may change.

        The file is mapped for each tensor anew, because one mapping would keep every page that was read in memory.
        """
        dtype, (begin, end) = self.dtype(name), self._spans[name]
        try:
            content = torch.UntypedStorage.from_file(str(self.path), False, self._bytes)[begin:end]
        except RuntimeError as error:  # the file cannot be mapped, or has become shorter
            raise FormatError(f"{self.path}: {name} cannot be read ({error})") from error
        return torch.empty(0, dtype=torch.uint8, device="cpu").set_(content).view(dtype).view(self.shapes[name])


def shard_names(index_path: Path) -> dict[str, str]:
    """Return the `weight_map` of a `*.safetensors.index.json`: tensor name -> file name."""
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise FormatError(f"{index_path}: key 'weight_map' is missing or not an object")
    for name in weight_map.values():
        if not isinstance(name, str) or name in ("", ".", "..") or any(character in name for character in "/\\:\0"):
            raise FormatError(f"{index_path}: {name!r} is not a plain file name")
    return weight_map


def is_finite(tensor: Tensor) -> bool:
    """Return whether all numbers are finite, without the copy that `isfinite` makes of them."""
    return not tensor.numel() or bool(torch.stack(tensor.detach().aminmax()).isfinite().all())


def tensor_files(directory: Path) -> dict[str, TensorFile]:
    """Return for each tensor of a model directory the file that holds it."""
    index = directory / INDEX
    if not index.is_file():
        file = TensorFile(directory / "model.safetensors")
        return dict.fromkeys(file.shapes, file)
    weight_map = shard_names(index)
    shards = {name: TensorFile(directory / name) for name in sorted(set(weight_map.values()))}
    if lacking := sorted(name for name, shard in weight_map.items() if name not in shards[shard].shapes):
        raise FormatError(f"{index}: names tensors that their shards do not hold: {lacking[:5]}")
    return {name: shards[shard] for name, shard in weight_map.items()}
