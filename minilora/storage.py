"""Everything that touches the disk: JSON and safetensors that may come from anywhere, and writing that is atomic.

A file appears under its name only when it is whole: it is written under a temporary name beside it, flushed to the disk
(fsync), and renamed. Nothing is pickled.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minilora.errors import ConfigError, FormatError

BUILTIN = "minilora/builtin"
ASSETS = Path(__file__).parent / "assets"
DTYPES = {  # how a safetensors file spells them, and torch
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


def read_text(path: Path) -> str:
    """The text of a UTF-8 file.

    Raises:
        FormatError: there is no such file, or it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: byte {error.start} is not UTF-8") from error
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror})") from error


def read_bytes(path: Path) -> bytes:
    """The bytes of a file; of a `.gz` file, what it holds.

    Raises:
        FormatError: there is no such file, or it is not gzip.
    """
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except MemoryError as error:
        raise FormatError(f"{path}: does not fit into memory") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise FormatError(f"{path}: not gzip, or damaged ({error})") from error
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror})") from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        FormatError: the file cannot be read, or it does not hold a JSON object.
    """
    text = read_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # also for numbers of more digits than Python reads
        raise FormatError(f"{path}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise FormatError(f"{path}: found a JSON {type(value).__name__}, need an object")
    return value


@dataclass(frozen=True)
class TensorEntry:
    """What a header says of a tensor; `dtype` as the file spells it (BF16, F32, …)."""

    dtype: str
    shape: tuple[int, ...]
    bytes: int


class TensorFile:
    """A safetensors file: its header is read at once, a tensor only when it is asked for.

    Raises:
        FormatError: the file cannot be read, or its header is not that of a safetensors file.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            # Checks the header: no gaps, sizes that fit dtype and shape. For PyTorch, it would map the file.
            with safe_open(path, framework="numpy"), path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(size))
            self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
            self.entries = {name: _entry(header[name]) for name in sorted(header)}
            self._spans = {name: [8 + size + at for at in header[name]["data_offsets"]] for name in header}
            self._bytes = path.stat().st_size
        except (OSError, SafetensorError, TypeError) as error:  # TypeError: an entry that is a list
            raise FormatError(f"{path}: not a safetensors file ({error})") from error
        self.shapes = {name: entry.shape for name, entry in self.entries.items()}

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of one tensor.

        Raises:
            FormatError: torch does not have it.
        """
        stored = self.entries[name].dtype
        if stored not in DTYPES:
            raise FormatError(f"{self.path}: {name} cannot be read: it is {stored}; what can be are {list(DTYPES)}")
        return getattr(torch, DTYPES[stored])

    def read(self, name: str) -> Tensor:
        """One tensor, as a view of the mapped file: copy it before the file may change.

        The file is mapped for this tensor alone. One mapping for all of them would keep every page that was read
        resident, and a model in memory twice. It is torch that maps: `safe_open` would read the header each time.

        Raises:
            FormatError: it cannot be read.
        """
        dtype, (begin, end) = self.dtype(name), self._spans[name]
        try:
            content = torch.UntypedStorage.from_file(str(self.path), False, self._bytes)[begin:end]
        except RuntimeError as error:  # it cannot be mapped, or is shorter now
            raise FormatError(f"{self.path}: {name} cannot be read ({error})") from error
        return torch.empty(0, dtype=torch.uint8, device="cpu").set_(content).view(dtype).view(self.shapes[name])


def _entry(entry: dict[str, Any]) -> TensorEntry:
    begin, end = entry["data_offsets"]
    return TensorEntry(entry["dtype"], tuple(entry["shape"]), end - begin)


def shard_names(index_path: Path) -> dict[str, str]:
    """`weight_map` of a `*.safetensors.index.json`: tensor name -> file name.

    Raises:
        FormatError: there is no such map, or it names something other than a plain file of the same directory.
    """
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise FormatError(f"{index_path}: key 'weight_map' is missing or not an object")
    for name in weight_map.values():
        if not isinstance(name, str) or name in ("", ".", "..") or any(character in name for character in "/\\:\0"):
            raise FormatError(f"{index_path}: {name!r} is not a plain file name")
    return weight_map


def holds_files(out: Path) -> bool:
    """Is there anything in a directory to write to, but for a lock and what a killed writer left?

    Raises:
        ConfigError: it is a file.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out}: is a file; give a directory as --out")
    return out.exists() and any(not re.fullmatch(r"\.lock|\..*\.tmp", path.name) for path in out.iterdir())


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name that becomes `path`, a file or a directory, when the block ends without an error.

    >>> with replacing(Path("notes.txt")) as temporary:      # doctest: +SKIP
    ...     temporary.write_text("whole or not at all")
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        for written in [*temporary.rglob("*"), temporary]:
            _flush(written)
        os.replace(temporary, path)
        _flush(path.parent)
    finally:
        remove(temporary)


def remove(path: Path) -> None:
    """Remove a file or a directory, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON with the keys in the order they have."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file; `metadata` is added to {"format": "pt"}, which transformers asks for."""
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode  # as the user's umask has it; save_file leaves 0600
        contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
        try:
            save_file(contiguous, temporary, metadata={"format": "pt", **(metadata or {})})
        except SafetensorError as error:  # a full disk, and the like
            raise OSError(f"{path}: cannot be written ({error})") from error
        _sort_metadata(temporary)
        temporary.chmod(mode)


def _sort_metadata(path: Path) -> None:
    """Give the metadata of a safetensors file one order: save_file's changes from call to call."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header = {"__metadata__": dict(sorted(header.pop("__metadata__").items())), **header}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= size  # or it would overwrite what follows
        file.seek(8)
        file.write(text.ljust(size))


def append_line(path: Path, value: Mapping[str, Any]) -> None:
    """Append one JSON object as a line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(value) + "\n")


def _flush(path: Path) -> None:
    """Ask the operating system to put a file or a directory entry on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open directories
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


SHARD_BYTES = 5_000_000_000
INDEX = "model.safetensors.index.json"


def tensor_files(directory: Path) -> dict[str, TensorFile]:
    """Tensor name -> the file that holds it."""
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

    Only one file's tensors are held at a time, and on the CPU. How many files there are is known at the end: until
    then they have temporary names. What a directory held before goes, and what a writer that was killed left.
    """
    written: list[tuple[Path, list[str], int]] = []
    shard: dict[str, Tensor] = {}

    def flush() -> None:
        path = directory / f".model-{len(written) + 1:05d}.tmp"
        write_tensors(path, shard)
        written.append((path, list(shard), _bytes(shard)))
        shard.clear()

    for left in directory.glob(".*model-*.tmp"):
        remove(left)
    try:
        for group in map(_on_cpu, groups):
            if shard and _bytes(shard) + _bytes(group) > limit:
                flush()
            shard |= group
        flush()
        files = [_file(i, len(written)) for i in range(len(written))]
        remove(directory / INDEX)  # or what it names would be a mixture for a moment
        for (path, *_), file in zip(written, files, strict=True):
            os.replace(path, directory / file)
    finally:
        for path, *_ in written:
            remove(path)
    if len(files) > 1:
        weight_map = {name: file for (_, names, _), file in zip(written, files, strict=True) for name in names}
        total = sum(size for *_, size in written)
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    for old in [directory / "model.safetensors", *directory.glob("model-*-of-*.safetensors")]:
        if old.name not in files:
            remove(old)


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in tensors.items()}


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _file(index: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"
