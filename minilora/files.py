"""Files: safe reading of files from outside, and atomic writing.

Memory and time of reading may grow with the bytes of a file, but not with a number that it states: that is compared
with what is there, or with a limit, before anything is allocated.

A file or a whole directory is written by `replacing`: under another name beside it, flushed to the disk, renamed.
`publishing` replaces some files of a directory: the old config is removed first and the new one comes last, so what a
killed process leaves has no config and cannot be loaded. A manifest has size and SHA-256 of each file.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minilora.errors import FormatError

BUILTIN = "minilora/builtin"
ASSETS = Path(__file__).parent / "assets"
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
INDEX = "model.safetensors.index.json"
MANIFEST = "minilora-manifest.json"
LAST = ("adapter_config.json", "config.json", "summary.json")  # a run that has a summary is finished
ALIGNMENT = 64  # of a tensor that is written: a line of the cache
JSON_BYTES = 2**24  # of a JSON or text file; the index of 100,000 tensors has 10 MB
JSON_VALUES = 10**6  # in it: a value takes 80 bytes of memory, and as little as 3 in the file


def open_file(path: Path, most: int | None = None, is_named: bool = False) -> BufferedReader:
    """Open a file to read its bytes; `is_named` means that the user named it, and not only its directory."""
    try:
        if not is_named:
            check_link(path)
        size = path.stat().st_size
        if not path.is_file():
            raise FormatError(f"{path}: cannot be read (it is a directory, a FIFO, a socket or a device)")
        if most is not None and size > most:
            raise FormatError(f"{path}: has {size:,} bytes; at most {most:,} are accepted")
        return path.open("rb")
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror})") from error


def check_link(path: Path) -> None:
    """Raise a `FormatError` if a file is a link out of its directory, unless to `blobs`, as in the cache of the hub."""
    if path.is_symlink():
        target, home = Path(os.path.realpath(path)), path.parent.resolve()
        if not (target.is_relative_to(home) or target.is_relative_to(home.parent.parent / "blobs")):
            raise FormatError(f"{path}: is a link to {target}, outside its directory, which is not followed")


def parse_object(text: str | bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object of at most `JSON_VALUES`, or raise a `FormatError` whose message begins with `where`."""
    try:
        text = text if isinstance(text, str) else text.decode()
        if sum(map(text.count, (",", "[", "{"))) > JSON_VALUES:
            raise ValueError(f"more than {JSON_VALUES:,} values")
        value = json.loads(text)
        if re.search(r"\\u[dD][89a-fA-F]", text):  # a half of a surrogate pair, perhaps, which no text may hold
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        reason = re.sub(r": line 1 (column \d+) .*", r" at \1", str(error))
        raise FormatError(f"{where}: not JSON ({reason})") from error
    if not isinstance(value, dict):
        raise FormatError(f"{where}: found a JSON {type(value).__name__}, need an object")
    return value


def read_text(path: Path, most: int = JSON_BYTES, is_named: bool = False) -> str:
    """Return the text of a UTF-8 file of at most `most` bytes; for `is_named` see `open_file`."""
    with open_file(path, most, is_named) as file:
        try:
            return file.read().decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
        except UnicodeDecodeError as error:
            raise FormatError(f"{path}: byte {error.start} is not UTF-8") from error


def read_json(path: Path, is_named: bool = False) -> dict[str, Any]:
    """Return the JSON object in a file."""
    return parse_object(read_text(path, is_named=is_named), str(path))


Rename = Callable[[str], str | None]


@dataclass(frozen=True)
class TensorEntry:
    """The header's entry of a tensor: its dtype as the file spells it (BF16, F32, …), its shape and its size."""

    dtype: str
    shape: tuple[int, ...]
    bytes: int


class TensorFile:
    """A safetensors file, whose header is read at once, and a tensor only when it is asked for.

    With `rename`, tensors have the names that it gives to those of the file, and are left out where it gives None.
    """

    def __init__(self, path: Path, is_mapped_once: bool = False, rename: Rename | None = None):
        self.path = path
        with open_file(path) as file:
            size = int.from_bytes(file.read(8), "little")
            text = file.read(min(size, 2 * JSON_BYTES))
        header = parse_object(text, f"{path}: not a safetensors file")
        self.entries: dict[str, TensorEntry] = {}
        self._spans: dict[str, slice] = {}
        try:
            # `safe_open` checks that sizes fit dtypes and shapes, without gaps. For PyTorch, it would map the file.
            with safe_open(path, framework="numpy") as checked:
                self.metadata: dict[str, str] = checked.metadata() or {}
            for stored in sorted(header.keys() - {"__metadata__"}):
                if (name := rename(stored) if rename else stored) is None:
                    continue
                dtype, shape, (begin, end) = (header[stored][key] for key in ("dtype", "shape", "data_offsets"))
                self.entries[name] = TensorEntry(dtype, tuple(shape), end - begin)
                self._spans[name] = slice(8 + size + begin, 8 + size + end)
        except (OSError, SafetensorError, TypeError) as error:  # TypeError: an entry that is a list
            raise FormatError(f"{path}: not a safetensors file ({error})") from error
        self.shapes = {name: entry.shape for name, entry in self.entries.items()}
        if odd := [name for name, shape in self.shapes.items() if len(shape) > 64 or max(shape, default=0) >= 2**63]:
            raise FormatError(f"{path}: {odd[0]:.80} has a shape that no tensor can have")
        map_file = partial(torch.UntypedStorage.from_file, str(path), False, path.stat().st_size)
        self._map = cache(map_file) if is_mapped_once else map_file

    def read(self, name: str) -> Tensor:
        """Return a tensor as a view of the mapped file, which changes with the file; writing to it copies its pages.

        With `is_mapped_once` all tensors share one mapping, for those that stay views. Otherwise each tensor maps the
        file anew, because one mapping would keep every page that was read in memory.
        """
        entry = self.entries[name]
        try:
            content = torch.empty(0, dtype=torch.uint8, device="cpu").set_(self._map()[self._spans[name]])
            return content.view(DTYPES[entry.dtype]).view(entry.shape)
        except (KeyError, RuntimeError) as error:  # no such dtype, not mapped, or a file that has become shorter
            raise FormatError(f"{self.path}: {name} cannot be read: {error}; dtypes are {[*DTYPES]}") from error


def tensor_files(directory: Path, is_mapped_once: bool = False, rename: Rename | None = None) -> dict[str, TensorFile]:
    """Return for each tensor of a model directory the file that has it; for the arguments see `TensorFile`."""
    index = directory / INDEX
    if not index.is_file():
        file = TensorFile(directory / "model.safetensors", is_mapped_once, rename)
        return dict.fromkeys(file.shapes, file)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise FormatError(f"{index}: key 'weight_map' is missing or not an object")
    for name in weight_map.values():
        if not isinstance(name, str) or name in ("", ".", "..") or any(character in name for character in "/\\:\0"):
            raise FormatError(f"{index}: {name!r} is not a plain file name")
    shards = {name: TensorFile(directory / name, is_mapped_once, rename) for name in sorted(set(weight_map.values()))}
    if rename:
        weight_map = {rename(name): shard for name, shard in weight_map.items()}
        weight_map.pop(None, None)
    if lacking := sorted(name for name, shard in weight_map.items() if name not in shards[shard].shapes):
        raise FormatError(f"{index}: names tensors that their shards do not have: {lacking[:5]}")
    return {name: shards[shard] for name, shard in weight_map.items()}


def write_json(path: Path, value: Any) -> None:
    """Write JSON without changing the order of keys."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file; `metadata` is added to {"format": "pt"}, which transformers requires."""
    header_bytes = sum(entry_bytes(name, tensor.dim()) for name, tensor in tensors.items())
    stream_tensors(path, tensors.items(), header_bytes, metadata or {})


def entry_bytes(name: str, dimensions: int = 2) -> int:
    """Return how many bytes a tensor's entry in a header may take."""
    return len(json.dumps(name)) + 100 + 16 * dimensions  # a number has up to 15 digits


def stream_tensors(
    path: Path, tensors: Iterable[tuple[str, Tensor]], header_bytes: int, metadata: Mapping[str, str]
) -> dict[str, Any]:
    """Write tensors into a safetensors file as they come, behind room for its header; return the header's entries.

    Each begins at a multiple of `ALIGNMENT`, where kernels read it fastest from the mapped file. A tensor that would
    move the next one off is held until the end, where the dtypes with the largest numbers are first.
    """
    spelled = {dtype: name for name, dtype in DTYPES.items()}
    described = {"__metadata__": dict(sorted({"format": "pt", **metadata}.items()))}
    begin = -(-(8 + len(json.dumps(described)) + header_bytes) // ALIGNMENT) * ALIGNMENT
    entries: dict[str, Any] = {}
    held: dict[str, Tensor] = {}
    with path.open("wb") as file:
        file.seek(begin)

        def write(name: str, tensor: Tensor) -> None:
            if tensor.dtype not in spelled:
                raise FormatError(f"{path}: {name} is {tensor.dtype}; supported are {list(DTYPES)}")
            offset = file.tell() - begin
            offsets = [offset, offset + tensor.nbytes]
            entries[name] = {"dtype": spelled[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
            file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

        for name, tensor in tensors:
            if tensor.nbytes % ALIGNMENT:
                held[name] = tensor
            else:
                write(name, tensor)
        for name, tensor in sorted(held.items(), key=lambda item: -item[1].dtype.itemsize):
            write(name, tensor)
        header = json.dumps(described | entries, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(header) <= begin - 8
        file.seek(0)
        file.write((begin - 8).to_bytes(8, "little") + header.ljust(begin - 8))
    return entries


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary name for a file or a directory, which is renamed to `path` if the block raises no error."""
    make_directory(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    remove(temporary)
    try:
        yield temporary
        for written in [*temporary.rglob("*"), temporary]:
            flush(written)
        os.replace(temporary, path)
        flush(path.parent)
    except OSError as error:  # a full disk, for example
        raise OSError(f"{path}: cannot be written ({error})") from error
    finally:
        remove(temporary)


@contextmanager
def publishing(directory: Path, obsolete: Sequence[str] = ()) -> Iterator[Path]:
    """Give a temporary directory, whose files replace those in `directory` if the block raises no error.

    Files that match `obsolete` are removed. Those of `LAST` are removed before others change, and come after them.
    Several files are flushed and hashed at a time.
    """
    with replacing(directory / MANIFEST) as temporary:
        temporary.mkdir()
        yield temporary
        with ThreadPoolExecutor() as threads:
            flushed = threads.map(flush, temporary.iterdir())
            manifest = manifest_of(temporary)
        list(flushed)  # raises what a flush has raised
        names = sorted(manifest["files"], key=lambda name: LAST.index(name) if name in LAST else -1)
        for pattern in (MANIFEST, *(name for name in LAST if name in names), *obsolete):
            for path in directory.glob(pattern):
                path.unlink()
        for name in names:
            if name in (names[0], *LAST):
                flush(directory)  # the order holds after a loss of power as well
            os.replace(temporary / name, directory / name)
        temporary.rmdir()
        write_json(temporary, manifest)


def manifest_of(directory: Path) -> dict[str, Any]:
    """Return size and SHA-256 of a directory's files, as its manifest has them."""
    paths = sorted(directory.iterdir())
    with ThreadPoolExecutor() as threads:
        return {"files": dict(zip((path.name for path in paths), threads.map(_entry, paths), strict=True))}


def read_manifest(directory: Path) -> dict[str, Any]:
    """Return the entries of a directory's manifest by name; raise a `FormatError` if it is missing or damaged."""
    path = directory / MANIFEST
    files = read_json(path).get("files")
    if not isinstance(files, dict) or any(Path(name).name != name for name in files):
        raise FormatError(f'{path}: is not a manifest: need {{"files": …}}, an object of plain file names')
    return files


def changed_files(directory: Path, names: Iterable[str] | None = None) -> list[str]:
    """Return the names of files, all or these, that are not as the manifest of their directory says."""
    files = read_manifest(directory)
    return [name for name in (files if names is None else names) if _entry(directory / name) != files.get(name, {})]


def verify(directory: Path, names: Iterable[str] | None = None) -> None:
    """Raise a `FormatError` if there are `changed_files`."""
    if changed := ", ".join(changed_files(directory, names)):
        problem = f"changed since minilora wrote it: {changed}"
        raise FormatError(f"{directory}: {problem}; if you changed it on purpose, remove its {MANIFEST}")


def _entry(path: Path) -> dict[str, Any] | None:
    """Return size and SHA-256 of a file; None if it is not there."""
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)} if path.is_file() else None


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_directory(path: Path) -> None:
    """Create a directory and those above it that are missing, and flush the entry of each."""
    if not path.exists():
        make_directory(path.parent)
        path.mkdir(exist_ok=True)
        flush(path.parent)


def remove(path: Path) -> None:
    """Remove a file or a directory, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Flush a file or a directory to the disk, if it exists."""
    if not path.exists() or (path.is_dir() and os.name == "nt"):
        return  # Windows cannot open directories
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
