"""Progress of a run on standard error, and texts shortened to one line."""

from __future__ import annotations

import shutil
import signal
import sys
import time
import unicodedata
from datetime import timedelta
from types import FrameType

from minilora.runs.evaluate import Progress
from minilora.runs.loop import Record
from minilora.runs.memory import amount

BAR = 12  # characters


class Meter:
    """Print progress to standard error: one line that is rewritten on a terminal, else a line every few seconds.

    It is an `on_step` of `train`. As the handler of a signal, its `stop` lets a run end after the current step.

    Args:
        evaluated: what the rows of evaluations are called.
        every: seconds between two lines without a terminal.
    """

    def __init__(self, evaluated: str = "held-out", every: float = 5.0):
        self.evaluated = evaluated
        self.every = every
        self.is_terminal = sys.stderr.isatty()
        self.stopped_by: int | None = None  # the number of a signal
        self.last = -every
        self.first: tuple[float, int] | None = None

    def __call__(self, record: Record) -> bool:
        if "eval_loss" in record:
            self._show_evaluation(record)
            return self.stopped_by is not None
        if "skipped" in record:
            self.keep(f"skipped {record['skipped']}")
            return self.stopped_by is not None
        now = time.monotonic()
        began, first_step = self.first = self.first or (now, record["step"])
        done, remaining = record["step"] - first_step, record["total_steps"] - record["step"]
        left = f"{timedelta(seconds=round((now - began) / done * remaining))}" if done else "?"
        filled = BAR * record["step"] // record["total_steps"]
        bar = f"{'━' * filled}{'─' * (BAR - filled)}  " if self.is_terminal else ""
        self.show(
            f"step {record['step']}/{record['total_steps']}  {bar}loss {record['loss']:.4f}  "
            f"{record['tokens_per_second']:,.0f} tokens/s  {left} left  {amount(record['peak_memory_bytes'])}",
            is_last=not remaining,
        )
        return self.stopped_by is not None

    def rows(self, *what: str) -> Progress:
        """Return a callback that reports the progress of an evaluation."""
        self.last = time.monotonic()

        def report(done: int, total: int) -> None:
            self.show(f"{', '.join(what)}: {done:,} of {total:,} rows")

        return report

    def show(self, text: str, is_last: bool = False) -> None:
        """Print a line that the next one overwrites; without a terminal, one every few seconds."""
        now = time.monotonic()
        if self.is_terminal:
            width = shutil.get_terminal_size().columns - 1  # a line that wraps could not be overwritten
            print(f"\r\x1b[K{text[:width]}", end="\n" if is_last else "", file=sys.stderr, flush=True)
        elif is_last or now - self.last >= self.every:
            self.last = now
            print(text, file=sys.stderr, flush=True)

    def keep(self, text: str) -> None:
        """Print a line that stays."""
        print(("\r\x1b[K" if self.is_terminal else "") + text, file=sys.stderr, flush=True)

    def _show_evaluation(self, record: Record) -> None:
        step = record["step"]
        note = ", the lowest so far" if record["best_step"] == step else f", lowest at step {record['best_step']}"
        self.keep(f"step {step}  {self.evaluated} loss {record['eval_loss']:.4f}{note}")
        for sample in record.get("samples", ()):
            self.keep(f"  {ending(sample['prompt'])} -> {beginning(sample['text'])}")

    def stop(self, number: int, frame: FrameType | None) -> None:
        """Let the step finish at the first signal; stop at once at the second."""
        if self.stopped_by and number == signal.SIGINT:
            raise KeyboardInterrupt("stopped; the same command resumes from the newest checkpoint, if there is one")
        if self.stopped_by:
            raise SystemExit(128 + number)
        self.stopped_by = number
        self.keep("finishing this step; a second signal stops at once")

    def close(self) -> None:
        """Clear the line that would be overwritten next."""
        if self.is_terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def visible(text: str) -> str:
    """Remove control and other invisible characters, except line ends and tabs."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf"))


def ending(text: str, most: int = 30) -> str:
    """Return the end of a text in one line of at most that many characters."""
    text = visible(" ".join(text.split()))
    return text if len(text) <= most else "…" + text[1 - most :]


def beginning(text: str, most: int = 42) -> str:
    """Return the beginning of a text in one line of at most that many characters."""
    text = visible(" ".join(text.split()))
    return text if len(text) <= most else text[: most - 1] + "…"
