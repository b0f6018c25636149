"""Reading JSON and safetensors from untrusted sources, and writing them.

Only safetensors and JSON are read, never pickles. A file that cannot be read raises a `FormatError` that names it.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minilora.durable import replacing
from minilora.errors import FormatError
from minilora.limits import DIMENSIONS, ELEMENTS, JSON_BYTES, UNPACKED, UNPACKED_TIMES, open_file, parse_json

BUILTIN = "minilora/builtin"
ASSETS = Path(__file__).parent / "assets"
CHUNK = 2**20  # bytes of a data file that are read at a time
DTYPES = {  # names in a safetensors file, and in torch
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


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
        return getattr(torch, DTYPES[stored])

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


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON without changing the order of keys."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file; `metadata` is added to {"format": "pt"}, which transformers requires."""
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode  # by the user's umask; save_file sets 0600
        contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        try:
            save_file(contiguous, temporary, metadata={"format": "pt", **(metadata or {})})
        except SafetensorError as error:  # a full disk, for example
            raise OSError(f"{path}: cannot be written ({error})") from error
        _sort_metadata(temporary)
        temporary.chmod(mode)


def _sort_metadata(path: Path) -> None:
    """Sort the metadata of a safetensors file, whose order changes from call to call of `save_file`."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header = {"__metadata__": dict(sorted(header.pop("__metadata__").items())), **header}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= size
        file.seek(8)
        file.write(text.ljust(size))


def is_finite(tensor: Tensor) -> bool:
    """Return whether all numbers are finite, without the copy that `isfinite` makes of them."""
    return not tensor.numel() or bool(torch.stack(tensor.detach().aminmax()).isfinite().all())


def append_line(path: Path, value: Mapping[str, Any]) -> None:
    """Append one JSON object as a line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(value) + "\n")


SHARD_BYTES = 5_000_000_000
INDEX = "model.safetensors.index.json"
MODEL_FILES = ("config.json", INDEX, "model.safetensors", "model-*-of-*.safetensors")


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


def write_shards(directory: Path, groups: Iterable[Mapping[str, Tensor]], limit: int) -> None:
    """Write groups of tensors, in order, into files of at most `limit` bytes; a group is never divided.

    Only one file's tensors are held at a time, on the CPU. Their names follow when their number is known.
    """
    written: list[dict[str, int]] = []  # of each file, the bytes of its tensors
    shard: dict[str, Tensor] = {}

    def flush() -> None:
        write_tensors(directory / f"{len(written)}", shard)
        written.append({name: tensor.nbytes for name, tensor in shard.items()})
        shard.clear()

    for group in groups:
        if shard and sum(tensor.nbytes for tensor in [*shard.values(), *group.values()]) > limit:
            flush()
        shard |= {name: tensor.detach().cpu() for name, tensor in group.items()}
        del group  # which may be on another device, before the next one is made
    flush()
    n = len(written)
    files = [f"model-{i:05d}-of-{n:05d}.safetensors" if n > 1 else "model.safetensors" for i in range(1, n + 1)]
    for i, file in enumerate(files):
        os.replace(directory / f"{i}", directory / file)
    if n > 1:
        weight_map = {name: file for sizes, file in zip(written, files, strict=True) for name in sizes}
        total = sum(sum(sizes.values()) for sizes in written)
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
