"""Reports of a run: progress on standard error; its records, also for other libraries; reading them.

{"step": 20, "loss": 0.545, "learning_rate": 0.0016, "grad_norm": 2.80, …}      a line of metrics.jsonl for a step
{"step": 20, "eval_loss": 0.488, …}                                             and one for an evaluation
"""

import json
import math
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from threading import Event, RLock, Thread
from time import time
from types import FrameType
from typing import Any, Literal

from tqdm import tqdm  # type: ignore[import-untyped]

from minilora.errors import FormatError
from minilora.files import parse_object, read_text, replacing
from minilora.options import check_types
from minilora.runs.loop import Record
from minilora.runs.memory import amount

RECORDS_BYTES = 2**30  # of metrics.jsonl; a step has 200
SECONDS = 5.0  # between two lines without a terminal, and between two looks of the clock
BAR = " {n_fmt}/{total_fmt} {bar:12} {elapsed}<{remaining}{postfix}"


class _Bar(tqdm):  # type: ignore[misc]
    """A bar of one process: tqdm's own lock is shared with forked ones, and stays locked if one is killed."""

    _lock = RLock()


class _Lines:
    """Standard error that is no terminal: each state of a bar is a line."""

    def write(self, text: str) -> None:
        if text := text.strip("\r\n "):
            print(text, file=sys.stderr, flush=True)

    def flush(self) -> None: ...


class ProgressBar:
    """Show progress on standard error by tqdm: a bar on a terminal, else a line every few seconds.

    It is an `on_step` of `train`. As the handler of a signal, its `stop` lets a run end after the current step. In a
    `with` block, its clock moves even during a long step, and it is closed at the end.
    """

    def __init__(self) -> None:
        self.evaluated = "held-out"  # what the rows of evaluations are called
        self.stopped_by: int | None = None  # the number of a signal
        self._what = ""  # that the bar shows
        self._bar: tqdm[Any] | None = None
        self._ended = Event()

    def __enter__(self) -> "ProgressBar":
        self._clock = Thread(target=self._show_time, daemon=True)
        self._clock.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._clock.join()
        self.close()

    def _show_time(self) -> None:
        """Show the bar again where it was not for some seconds, until the block ends."""
        while not self._ended.wait(SECONDS):
            with _Bar.get_lock():  # or it could be closed before it is shown
                if self._bar is not None and time() - self._bar.last_print_t >= SECONDS:
                    self._bar.delay = 0  # or `close` would leave it
                    self._bar.refresh()

    def __call__(self, record: Record) -> bool:
        step = record["step"]
        if "eval_loss" in record:
            best = record["best_step"]
            note = ", the lowest so far" if best == step else f", lowest at step {best}" if best else ""
            self.keep(f"step {step}  {self.evaluated} loss {record['eval_loss']:.4f}{note}")
        else:
            memory = amount(record["peak_memory_bytes"])
            about = f"loss {record['loss']:.4f}, {record['tokens_per_second']:,.0f} tokens/s, peak {memory}"
            self.show("step", step, record["total_steps"], about)
        return self.stopped_by is not None

    def show(self, what: str, done: int = 0, total: int | None = None, about: str = "") -> None:
        """Show what is done, and how much of it; the line of something else is replaced."""
        if self._bar is None or self._what != what:
            self.close()
            self._what = what
            file, interval = (sys.stderr, 0.1) if sys.stderr.isatty() else (_Lines(), SECONDS)
            self._bar = _Bar(
                desc=what,
                total=total,
                initial=done,
                postfix=about,
                bar_format="{desc}" + (BAR if total else ""),
                leave=what == "step",
                delay=interval if total and what != "step" else 0,  # an evaluation that is short is not shown
                file=file,
                mininterval=interval,
                miniters=1,  # only the clock decides
            )
        self._bar.set_postfix_str(about, refresh=False)
        self._bar.update(done - self._bar.n)
        if done == total:
            self.close()

    def keep(self, text: str) -> None:
        """Print a line that stays."""
        if self._bar is not None:
            self._bar.clear()
        print(text, file=sys.stderr, flush=True)

    def stop(self, number: int, frame: FrameType | None) -> None:
        """Let the step finish at the first signal; stop at once at the second."""
        if self.stopped_by and number == signal.SIGINT:
            raise KeyboardInterrupt("stopped; the same command resumes from the newest checkpoint, if there is one")
        if self.stopped_by:
            raise SystemExit(128 + number)
        self.stopped_by = number
        self.keep("finishing this step; a second signal stops at once")

    def close(self) -> None:
        """End the line that would be overwritten next."""
        if self._bar is not None:
            with _Bar.get_lock():
                self._bar.close()
                self._bar = None


@dataclass
class Tracker:
    """Write the numbers of each record; pass a tracker to `train` as `on_step`.

    "jsonl" writes `metrics.jsonl` in the directory, which `minilora plot` reads, and "tensorboard" writes the folder
    `tensorboard`. Both drop earlier records of the first record's step and of later steps, which a resumed run repeats.
    In trackio and wandb the run belongs to `project` and is called `name`, by default the name of the directory.

    Raises:
        ModuleNotFoundError: the library is not installed.
    """

    library: Literal["jsonl", "tensorboard", "trackio", "wandb"]
    directory: str | Path
    config: Mapping[str, Any] | None = None
    project: str = "minilora"
    name: str | None = None

    def __post_init__(self) -> None:
        check_types(self)
        self.run: Any = None
        if self.library == "tensorboard":
            import_module("torch.utils.tensorboard")
        elif self.library != "jsonl":
            name = self.name or Path(self.directory).name
            self.run = import_module(self.library).init(project=self.project, name=name, config=self.config)

    def __call__(self, record: Mapping[str, Any]) -> None:
        step = record["step"]
        measured = {key: value for key, value in record.items() if key not in ("step", "total_steps")}
        numbers = {key: value for key, value in measured.items() if isinstance(value, int | float)}
        self.run = self.run or self._open(step)
        if self.library == "jsonl":
            finite = {key: value if math.isfinite(value) else None for key, value in numbers.items()}
            with self.run.open("a", encoding="utf-8") as file:
                file.write(f"{json.dumps({'step': step, **finite})}\n")
        elif self.library == "tensorboard":
            for key, value in numbers.items():
                self.run.add_scalar(key, value, step)
            self.run.flush()  # a crash loses no record
        else:
            self.run.log(numbers, step=step)

    def _open(self, step: int) -> Any:
        if self.library == "tensorboard":
            board = import_module("torch.utils.tensorboard")
            return board.SummaryWriter(str(Path(self.directory) / "tensorboard"), purge_step=step)
        path = Path(self.directory) / "metrics.jsonl"
        records = read_records(path) if path.exists() else []
        lines = [f"{json.dumps(record)}\n" for record in records if record["step"] < step]
        with replacing(path) as temporary:
            temporary.write_text("".join(lines), encoding="utf-8")
        return path

    def close(self) -> None:
        if self.library == "tensorboard" and self.run:
            self.run.close()
        elif self.library in ("trackio", "wandb"):
            self.run.finish()


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read the objects in a metrics.jsonl. A last line that was cut off by a crash is left out."""
    lines = read_text(path, RECORDS_BYTES).splitlines(keepends=True)
    records = []
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    for number, line in enumerate(lines, start=1):
        record = parse_object(line, f"{path}, line {number}")
        if type(record.get("step")) is not int:
            raise FormatError(f"{path}, line {number}: need an object with a whole number as 'step'")
        records.append(record)
    return records
