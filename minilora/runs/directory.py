"""The directory of a run as a place on the disk: one process at a time may use it, and there has to be room."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import TextIO

from minilora.errors import TrainingError
from minilora.runs.memory import Forecast, amount

if sys.platform != "win32":  # which has no such module, and there is no lock
    import fcntl


def lock(out: Path) -> TextIO:
    """Create a directory, and lock it until the returned file is closed or the process ends, in whatever way.

    The file is `.lock`, and holds the process id. It is never removed, since another process may have opened it.

    Raises:
        TrainingError: the directory cannot be written, or another process has locked it.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = (out / ".lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise TrainingError(f"{out}: cannot be written ({error.strerror}); give another --out") from error
    try:
        if sys.platform != "win32":
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        with file:
            file.seek(0)
            raise TrainingError(f"{out}: process {file.read()} is at work there; give another --out") from error
    except OSError:  # a file system without locks
        pass
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def check_room(out: Path, found: Forecast) -> None:
    """Check that the disk has room for the result of a run and for one checkpoint.

    Raises:
        TrainingError: it has not.
    """
    need, free = 2 * found.gradients + found.moments, shutil.disk_usage(out).free  # a gradient is as large as a weight
    if free < need:
        raise TrainingError(
            f"{out}: the result and a checkpoint take {amount(need)}, and {amount(free)} are free on the disk; "
            "make room, or give another --out; --force runs all the same"
        )
