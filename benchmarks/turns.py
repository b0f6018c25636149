"""In each round everyone has a turn at a work, so that a slow moment of the machine meets all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import make
from benchmarks import work as works
from benchmarks.process import Measurement, Round, called, gemm_peak, in_fresh_process
from benchmarks.work import OURS, Operation, Task, Training, Work

TRAINING = {  # the function of each side
    OURS: ("benchmarks.ours", "train"),
    "lora": ("benchmarks.ours", "train_dense"),
    "peft": ("benchmarks.peers", "train_peft"),
    "trl": ("benchmarks.peers", "train_trl"),
    "trl-best": ("benchmarks.peers", "train_trl_best"),
    "litgpt": ("benchmarks.peers", "train_litgpt"),
}


def measured(task: Task, side: str) -> Measurement:
    """What a side measures of a task, in a fresh process."""
    if isinstance(task.work, Training):
        module, function = TRAINING[side]
    else:
        module, function = f"benchmarks.{'our' if side == OURS else 'peer'}_operations", task.work.does
    return in_fresh_process(called, module, function, replace(task, side=side))


class Workshop:
    """A folder with what works begin with, models and adapters, each made when it is asked for."""

    def __init__(self, folder: Path, smollm2: Path | None, device: str):
        self.folder, self.device = folder, device
        self.models = {} if smollm2 is None else {"smollm2": smollm2}

    def model(self, name: str) -> Path:
        """A model's directory; of random weights, unless a directory was given."""
        if name not in self.models:
            make.random_model(works.MODELS[name], self.folder / name)
            self.models[name] = self.folder / name
        return self.models[name]

    def layers(self, count: int) -> str:
        """The name of a model of SmolLM2's sizes, but for its number of layers."""
        name = f"{count} layers"
        if name not in self.models:
            make.random_model({**works.SMOLLM2, "num_hidden_layers": count}, self.folder / name)
            self.models[name] = self.folder / name
        return name

    def adapter(self, model: str, dora: bool = False, rank: int = works.RANK) -> Path:
        """An adapter of a model."""
        path = self.folder / f"{model}-{'dora' if dora else 'lora'}-{rank}"
        if not path.exists():
            make.adapter(self.model(model), path, dora, rank)
        return path

    def task(self, work: Work, warm_up: int = works.WARM_UP, steps: int = works.STEPS) -> Task:
        """All that a side of a work needs to know."""
        model, adapter = self.model(work.model), self.adapter(work.model, work.method == "dora")
        vocabulary = works.config_of(model)["vocab_size"]
        if isinstance(work, Operation):
            return Task(work, model, adapter, self.device, prompts=works.prompts(work.prompts, vocabulary))
        rows = works.rows(work.kind, work.batch_size * (warm_up + steps), vocabulary)
        return Task(work, model, adapter, self.device, rows, make.batches(rows, work, warm_up + steps), warm_up)


def rounds(task: Task, sides: Sequence[str], count: int) -> Iterator[Round]:
    """In each round, what every side measured; for training the peak of matrix products, too.

    Raises:
        DifferentWorkError: a side did not compute what we did.
    """
    flop = sum(works.training_flops(works.config_of(task.model), batch) for batch in task.batches[task.warm_up :])
    for _ in range(count):
        found = {side: measured(task, side) for side in sides}
        for side in sides[1:]:
            check_same_work(found[OURS].checks, found[side].checks, task.work.bounds, side)
        if isinstance(task.work, Training):
            peak = in_fresh_process(gemm_peak, task.work.dtype, torch.device(task.device))
            yield Round(task.work.name, found, flop, peak, make.forecast_bytes(task))
        else:
            yield Round(task.work.name, found)


class DifferentWorkError(Exception):
    """Two sides did not compute the same."""


def check_same_work(ours: dict[str, float], theirs: dict[str, float], bounds: dict[str, float], side: str) -> None:
    """What both sides computed is the same within bounds, relative to the peer's.

    Raises:
        DifferentWorkError: it is not.
    """
    bad = [
        f"{name} {ours[name]:.6g}, of {side} {theirs[name]:.6g}, may differ by {bound:g} of it"
        for name, bound in bounds.items()
        if name in ours and name in theirs and not abs(ours[name] - theirs[name]) <= bound * abs(theirs[name])
    ]
    if bad:
        raise DifferentWorkError("; ".join(bad))
