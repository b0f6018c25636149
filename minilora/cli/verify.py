"""Check that the files of a run, an adapter or a model are as they were written.

Sizes and SHA-256 are compared with the manifest, those of checkpoints, too.

Example:
  minilora verify run
"""

from __future__ import annotations

import argparse
from pathlib import Path

from minilora.cli import Options
from minilora.durable import MANIFEST, read_manifest, settle, verify
from minilora.errors import FormatError
from minilora.runs.checkpoints import checkpoints


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="DIR", type=Path, help="directory of a run, an adapter or a model")


def run(options: Options) -> int:
    path, status = options["path"], 0
    settle(path)
    found = [each for each in (path, *checkpoints(path / "checkpoints")) if each != path or (path / MANIFEST).exists()]
    if not found:
        raise FormatError(f"{path}: holds no {MANIFEST} and no checkpoint, so there is nothing to compare with")
    for directory in found:
        try:
            verify(directory)
        except FormatError as error:
            print(error)
            status = 1
        else:
            print(f"{directory}: {len(read_manifest(directory))} files as written")
    return status
