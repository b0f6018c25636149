"""In each round everyone has a turn at a work, so that a slow moment of the machine meets all."""

import importlib.util
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch

from benchmarks import make
from benchmarks import work as works
from benchmarks.process import Measurement, Round, called, gemm_peak, in_fresh_process
from benchmarks.work import OURS, Task, Training

TRAINING = {  # the function of each side
    OURS: ("benchmarks.ours", "train"),
    "lora": ("benchmarks.ours", "train_dense"),
    "peft": ("benchmarks.peers", "train_peft"),
    "peft-kept": ("benchmarks.peers", "train_peft"),
    "peft-grouped": ("benchmarks.peers", "train_peft_grouped"),
    "trl": ("benchmarks.peers", "train_trl"),
    "trl-best": ("benchmarks.peers", "train_trl_best"),
}
PACKAGES = {"lora": OURS}  # of sides that are named otherwise


class RefusedError(Exception):
    """A work whose figures are not compared."""


def is_installed(side: str) -> bool:
    """Is the side's package there?"""
    return importlib.util.find_spec(PACKAGES.get(side, side.partition("-")[0])) is not None


def measured(task: Task, side: str) -> Measurement:
    """What a side measures of a task, in a fresh process.

    Raises:
        RefusedError: it failed.
    """
    module, function = TRAINING.get(side, ("benchmarks.ablation", "train"))
    try:
        with patch.dict(os.environ, works.KEPT if side == "peft-kept" else {}):
            return in_fresh_process(called, module, function, replace(task, side=side))
    except Exception as error:  # of a library that is not ours, or a process that the system has ended
        raise RefusedError(f"{side} failed, {type(error).__name__}: {error}") from error


class Workshop:
    """A folder with what works begin with: a model, SmolLM2 with random weights unless one is given, and adapters."""

    def __init__(self, folder: Path, model: Path | None, device: str):
        self.folder, self.device = folder, device
        self.model = model or folder / "model"
        if model is None:
            make.random_model(works.SMOLLM2, self.model)

    def adapter(self, dora: bool) -> Path:
        """An adapter of the model."""
        path = self.folder / ("dora" if dora else "lora")
        if not path.exists():
            make.adapter(self.model, path, dora)
        return path

    def task(self, work: Training, warm_up: int = works.WARM_UP, steps: int = works.STEPS) -> Task:
        """All that a side of a work needs to know."""
        model, adapter = self.model, self.adapter(work.method == "dora")
        vocabulary = works.config_of(model)["vocab_size"]
        rows = works.rows(work.kind, work.batch_size * (warm_up + steps), vocabulary)
        return Task(work, model, adapter, self.device, rows, make.batches(rows, work, warm_up + steps), warm_up)


def rounds(task: Task, sides: Sequence[str], count: int) -> Iterator[Round]:
    """In each round, what every side measured, and the peak of matrix products.

    Raises:
        RefusedError: a side failed, or did not compute what we did.
    """
    flop = sum(works.training_flops(works.config_of(task.model), batch) for batch in task.batches[task.warm_up :])
    for turn in range(count):
        found = taken(task, sides, turn)
        peak = in_fresh_process(gemm_peak, task.work.dtype, torch.device(task.device))
        yield Round(task.work.name, found, flop, peak, make.forecast_bytes(task))


def taken(task: Task, sides: Sequence[str], turn: int) -> dict[str, Measurement]:
    """What every side measures in a round; another one begins each, so that a machine that slows down favours nobody.

    Raises:
        RefusedError: a side failed, or did not compute what we did.
    """
    first = turn % len(sides)
    found = {side: measured(task, side) for side in (*sides[first:], *sides[:first])}
    for side in sides[1:]:
        check_same_work(found[OURS].checks, found[side].checks, task.work.bounds, side)
    return {side: found[side] for side in sides}


def check_same_work(ours: dict[str, float], theirs: dict[str, float], bounds: dict[str, float], side: str) -> None:
    """What both sides computed is the same within bounds, relative to the peer's.

    Raises:
        RefusedError: it is not.
    """
    bad = [
        f"{name} {ours[name]:.6g}, of {side} {theirs[name]:.6g}, may differ by {bound:g} of it"
        for name, bound in bounds.items()
        if name in ours and name in theirs and not abs(ours[name] - theirs[name]) <= bound * abs(theirs[name])
    ]
    if bad:
        raise RefusedError("; ".join(bad))
