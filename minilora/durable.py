"""Writing that a crash cannot tear: a file, or all files of a directory, are replaced as a whole or not at all.

    a file            written as .NAME.PID.tmp, flushed to the disk (fsync) and renamed; its directory is flushed
    a new directory   the same, with a manifest of its files
    some files of a   written into the directory .PID.tmp in it, with a manifest, and flushed; committed by renaming
    directory         that to .staged; then moved to their places (`settle`)

The manifest of a directory, minilora-manifest.json, holds the size and the SHA-256 of each of its files, or null for a
file that must not be there. One process at a time writes a directory (`lock`).
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from safetensors import SafetensorError
from torch import Tensor

from minilora.errors import ConfigError, FormatError, TrainingError
from minilora.storage import INDEX, read_json

if sys.platform != "win32":  # which has no such module, and there is no lock
    import fcntl

MANIFEST, STAGED = "minilora-manifest.json", ".staged"
NO_LINK = getattr(os, "O_NOFOLLOW", 0)  # a link could lead to the files of others
TEMPORARY = re.compile(r"\.(.*\.)?\d+\.tmp")  # with the PID: other programs have a .NAME.tmp, too


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary name for a file or a directory, which is renamed to `path` if the block raises no error.

    In a temporary directory, which is flushed and renamed as a whole, it is `path` itself.

    >>> with replacing(Path("notes.txt")) as temporary:      # doctest: +SKIP
    ...     temporary.write_text("whole or not at all")
    """
    if TEMPORARY.fullmatch(path.parent.name):
        path.parent.mkdir(parents=True, exist_ok=True)
        yield path
        return
    make_directory(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if temporary.is_dir():
            _write_manifest(temporary)
            remove(path)  # a damaged checkpoint
        _flush_all(temporary)
        os.replace(temporary, path)
        flush(path.parent)
    finally:
        remove(temporary)


@contextmanager
def publishing(directory: Path, obsolete: Sequence[str] = (), beside: Sequence[str] = ()) -> Iterator[Path]:
    """Give a directory for files that will replace those in `directory`, all at once, if the block raises no error.

    In a temporary directory, it is that directory itself.

    Args:
        directory: is created if necessary.
        obsolete: patterns of files that are removed unless they are replaced.
        beside: files of `directory` that the manifest is to list, too.
    """
    if TEMPORARY.fullmatch(directory.name):
        directory.mkdir(parents=True, exist_ok=True)
        yield directory
        return
    make_directory(directory)
    temporary = directory / f".{os.getpid()}.tmp"
    try:
        temporary.mkdir(exist_ok=True)
        yield temporary
        settle(directory)
        _write_manifest(temporary, {path.name for pattern in obsolete for path in directory.glob(pattern)}, beside)
        _flush_all(temporary)
        os.replace(temporary, directory / STAGED)  # refused while another process's files are there
        flush(directory)
        settle(directory)
    finally:
        remove(temporary)


def settle(directory: Path) -> None:
    """Move what `publishing` has staged to its place; a process that was killed may not have come to that.

    The old configs are removed first and the new ones come last, so other tools never read a config with tensors that
    are not its own.
    """
    staged = directory / STAGED
    if staged.is_symlink() or not staged.is_dir():  # a link from outside could lead to the files of others
        return
    if sys.platform == "win32":  # where there are no locks, and directories cannot be opened
        _settle(directory, staged)
        return
    try:
        handle = os.open(staged, os.O_RDONLY)
    except FileNotFoundError:  # another process has settled it
        return
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)  # a slower process would remove the configs that are in place
        is_same = False
        with suppress(FileNotFoundError):  # another process has settled it meanwhile
            is_same = os.path.samestat(os.fstat(handle), os.stat(staged))  # else it is another one's
        if is_same:
            _settle(directory, staged)
    finally:
        os.close(handle)


def _settle(directory: Path, staged: Path) -> None:
    if (staged / MANIFEST).is_file():
        names = [path.name for path in staged.iterdir()]
        for name, entry in read_manifest(staged).items():
            if entry is None or (name in names and _rank(name)):
                (directory / name).unlink(missing_ok=True)
        for rank in range(3):
            flush(directory)
            for name in names:
                if _rank(name) == rank:
                    with suppress(FileNotFoundError):  # another process has moved it
                        os.replace(staged / name, directory / name)
        flush(directory)
    with suppress(OSError):
        staged.rmdir()


def _rank(name: str) -> int:
    """Return when a file is moved to its place: configs after other files, the manifest last."""
    return 2 if name == MANIFEST else int(name.endswith("config.json"))


def _write_manifest(directory: Path, obsolete: Collection[str] = (), beside: Sequence[str] = ()) -> None:
    files: dict[str, Any] = dict.fromkeys(sorted(obsolete))
    files |= {name: _entry(directory.parent / name) for name in beside}
    files |= {path.name: _entry(path) for path in sorted(directory.iterdir())}
    (directory / MANIFEST).write_text(json.dumps({"files": files}, indent=2) + "\n", encoding="utf-8")


def read_manifest(directory: Path) -> dict[str, Any]:
    """Return the entries of a directory's manifest by name; raise a `FormatError` if it is missing or damaged."""
    path = directory / MANIFEST
    files = read_json(path).get("files")
    if not isinstance(files, dict) or any(Path(name).name != name for name in files):
        raise FormatError(f'{path}: is no manifest: need {{"files": …}}, an object of plain file names')
    return files


def verify(directory: Path, names: Iterable[str] | None = None) -> None:
    """Raise a `FormatError` if files of a directory, all or those that are named, are not as its manifest says."""
    files = read_manifest(directory)
    bad = [name for name in (files if names is None else names) if _entry(directory / name) != files.get(name, {})]
    if bad:
        raise FormatError(
            f"{directory}: not as it was written: {', '.join(bad)}; after a change on purpose, remove {MANIFEST} there"
        )


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


def _flush_all(path: Path) -> None:
    """Flush a file, or a directory with all that is in it."""
    for written in [*path.rglob("*"), path]:
        flush(written)


def flush(path: Path) -> None:
    """Flush a file or a directory to the disk, if it exists."""
    if not path.exists() or (path.is_dir() and os.name == "nt"):
        return  # Windows cannot open directories
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def holds_files(out: Path) -> bool:
    """Return whether a directory to write to holds anything other than a lock and temporary files."""
    _check_directory(out)
    return out.exists() and any(path.name != ".lock" and not TEMPORARY.fullmatch(path.name) for path in out.iterdir())


def _check_directory(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out}: is a file; give a directory as --out")


def lock(out: Path) -> TextIO:
    """Create a directory, and lock it until the returned file is closed or the process ends, in whatever way.

    The file is `.lock`, and names the process and its machine. What a writer that was killed left is settled or
    removed.

    Raises:
        ConfigError: `out` is a file.
        TrainingError: the directory cannot be written, or another process has locked it.
    """
    _check_directory(out)
    path = out / ".lock"
    try:
        make_directory(out)
        handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | NO_LINK, 0o666)
        file = os.fdopen(handle, "a+", encoding="utf-8")
    except OSError as error:
        raise TrainingError(f"{out}: cannot be written ({error.strerror}); give another --out") from error
    try:
        if sys.platform != "win32":
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        with file:
            file.seek(0)
            owner = file.read() or "another process"
            raise TrainingError(f"{out}: {owner} is at work there; give another --out") from error
    except OSError:  # a file system without locks
        pass
    if not (path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno()))):  # its owner removed it meanwhile
        file.close()
        return lock(out)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    settle(out)
    for left in (path for folder in (out, out / "checkpoints") for path in folder.glob(".*.tmp")):
        if TEMPORARY.fullmatch(left.name):
            remove(left)
    return file


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


def append_line(path: Path, value: Mapping[str, Any]) -> None:
    """Append one JSON object as a line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(without_nan(value), allow_nan=False) + "\n")


def without_nan(value: Any) -> Any:
    """Return a JSON value with null for each number that is not finite: JSON has no such numbers."""
    return json.loads(json.dumps(value), parse_constant=lambda name: None)


def write_shards(directory: Path, groups: Iterable[Mapping[str, Tensor]], limit: int) -> None:
    """Write groups of tensors, in order, into files of at most `limit` bytes; a group is never divided.

    Only one file's tensors are held at a time, on the CPU. Their names follow when their number is known.
    """
    written: list[dict[str, int]] = []  # of each file, the bytes of its tensors
    shard: dict[str, Tensor] = {}

    def write_shard() -> None:
        write_tensors(directory / f"{len(written)}", shard)
        written.append({name: tensor.nbytes for name, tensor in shard.items()})
        shard.clear()

    for group in groups:
        if shard and sum(tensor.nbytes for tensor in [*shard.values(), *group.values()]) > limit:
            write_shard()
        shard |= {name: tensor.detach().cpu() for name, tensor in group.items()}
        del group  # which may be on another device, before the next one is made
    write_shard()
    n = len(written)
    files = [f"model-{i:05d}-of-{n:05d}.safetensors" if n > 1 else "model.safetensors" for i in range(1, n + 1)]
    for i, file in enumerate(files):
        os.replace(directory / f"{i}", directory / file)
    if n > 1:
        weight_map = {name: file for sizes, file in zip(written, files, strict=True) for name in sizes}
        total = sum(sum(sizes.values()) for sizes in written)
        write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
