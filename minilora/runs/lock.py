"""The lock of a directory that a command writes: one process at a time is at work there."""

import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from minilora.errors import ConfigError, TrainingError
from minilora.files import make_directory, remove

LOCK = ".lock"
TEMPORARY = re.compile(r"\.(.*\.)?\d+\.tmp")  # with the PID: other programs have a .NAME.tmp as well


def holds_files(out: Path) -> bool:
    """Return whether a directory to write to has anything other than a lock and temporary files."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out}: found a file, need a directory")
    return out.exists() and any(path.name != LOCK and not TEMPORARY.fullmatch(path.name) for path in out.iterdir())


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Create a directory, and lock it inside the block; the lock of a process ends with it, in whatever way.

    The file `.lock` names the process and its machine. Temporary files of a writer that was killed are removed, and at
    the end the directory, if it is new and empty.
    """
    path, is_new = out / LOCK, not out.exists()
    try:
        make_directory(out)
        lock = FileLock(path, timeout=0)
        lock.acquire()
        path.write_text(f"process {os.getpid()} on {platform.node()}", encoding="utf-8")
    except Timeout as error:
        owner = "another process"
        with suppress(OSError):  # it has just ended and removed its file
            owner = path.read_text(encoding="utf-8") or owner
        raise TrainingError(f"{out}: {owner} is at work there; wait for it, or use another directory") from error
    except OSError as error:
        raise TrainingError(f"{out}: cannot be written ({error.strerror})") from error
    for folder in (out, out / "checkpoints"):
        for left in folder.glob(".*.tmp"):
            if TEMPORARY.fullmatch(left.name):
                remove(left)
    try:
        yield
    finally:
        remove(path)
        lock.release()
        if is_new and not any(out.iterdir()):
            out.rmdir()
