"""Progress on standard error."""

from __future__ import annotations

import sys
import time
from types import FrameType

from minilora.train.loop import Record


class Meter:
    """Progress on standard error: one rewriting line on a terminal, else a line now and then. Ctrl-C stops the run."""

    def __init__(self, every: float = 5.0):
        self.every = every
        self.is_terminal = sys.stderr.isatty()
        self.is_stopping = False
        self.last = -every
        self.first: tuple[float, int] | None = None

    def __call__(self, record: Record) -> bool:
        if "eval_loss" in record:
            self.show(f"step {record['step']}  held-out loss {record['eval_loss']:.4f}", lasting=True)
            return self.is_stopping
        now = time.monotonic()
        began, first_step = self.first = self.first or (now, record["step"])
        if self.is_terminal or now - self.last >= self.every or record["step"] == record["total_steps"]:
            self.last = now
            done, remaining = record["step"] - first_step, record["total_steps"] - record["step"]
            left = f"{(now - began) / done * remaining:.0f}" if done else "?"
            self.show(
                f"step {record['step']}/{record['total_steps']}  loss {record['loss']:.4f}  "
                f"{record['tokens_per_second']:,.0f} tokens/s  {left} s left  "
                f"{record['peak_memory_bytes'] / 2**30:.2f} GiB"
            )
        return self.is_stopping

    def show(self, text: str, lasting: bool = False) -> None:
        ending = "" if self.is_terminal and not lasting else "\n"
        print(("\r\x1b[K" if self.is_terminal else "") + text, end=ending, file=sys.stderr, flush=True)

    def stop(self, number: int, frame: FrameType | None) -> None:
        """The first Ctrl-C lets the step finish; the second one does not wait."""
        if self.is_stopping:
            raise KeyboardInterrupt
        self.is_stopping = True
        self.show("finishing this step; Ctrl-C again to stop at once", lasting=True)

    def close(self) -> None:
        if self.is_terminal:
            print(file=sys.stderr)
