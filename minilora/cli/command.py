"""What a command is, and how it speaks beside what it prints."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Options = dict[str, Any]  # the parsed flags of a command line
INTERRUPTED = 130  # the exit status of a program that Ctrl-C ended


@dataclass(frozen=True)
class Command:
    """One command, which the module of its name carries out, or `module`, where they differ.

    `help` is its line in the list of commands, `about` begins its own page, `example` is a command line that works.
    `prepare` may give its parser other defaults, having seen the words of the command line.
    """

    name: str
    help: str
    about: str
    example: str
    add_flags: Callable[[argparse.ArgumentParser], None]
    prepare: Callable[[argparse.ArgumentParser, Sequence[str]], None] | None = None
    module: str | None = None

    def run(self, options: Options) -> int:
        """Carry it out; the exit status. Its module is imported only now, since it brings PyTorch along."""
        return importlib.import_module(f"minilora.cli.{self.module or self.name}").run(options)


def say_bad(kind: str, bad: Sequence[str]) -> None:
    """How many rows of a kind were skipped, and why the first five."""
    say("\n  ".join((f"{len(bad)} {kind}rows cannot be used and were skipped:", *bad[:5])))


def say(text: str) -> None:
    """What the user should know but no other program wants to read."""
    print(text, file=sys.stderr, flush=True)
