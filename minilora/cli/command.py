"""What all commands share: their parsed flags, and what they print besides their results."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

Options = dict[str, Any]  # the parsed flags of a command line
INTERRUPTED = 130  # the exit status of a program that Ctrl-C ended


def say_bad(kind: str, bad: Sequence[str]) -> None:
    """Print how many rows of a kind were skipped, and the reasons for the first five."""
    say("\n  ".join((f"{len(bad)} {kind}rows cannot be used and were skipped:", *bad[:5])))


def say(text: str) -> None:
    """Print a message for the user to standard error, where no other program reads it."""
    print(text, file=sys.stderr, flush=True)
