"""minilora's side of each work, by its public names alone: what users get."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import minilora.public as ml  # all of it now: memory is counted from after the imports
from benchmarks.process import Clock, Measurement, Peak, first_and_last
from benchmarks.work import ANSWERED, LEARNING_RATE, MAX_GRAD_NORM, Task, Training
from minilora.runs.memory import kept_memory


def train_config(work: Training, steps: int) -> ml.TrainConfig:
    """The work's settings; the rate of learning is constant, as in the peers' loops."""
    return ml.TrainConfig(
        learning_rate=LEARNING_RATE,
        lr_scheduler="constant",
        warmup_steps=0,
        batch_size=work.batch_size,
        max_steps=steps,
        max_grad_norm=MAX_GRAD_NORM,
        gradient_checkpointing="block" if work.recompute else "none",
    )


def train(task: Task) -> Measurement:
    """Load, attach the adapter, and train."""
    work, device = task.work, torch.device(task.device)
    peak = Peak(task.device)
    model = ml.load_model(task.model, work.dtype, device, "nf4" if work.method == "qlora" else None)
    ml.load_adapter(model, task.adapter, trainable=True)
    examples = [ml.Example(tokens, labels) for tokens, labels in task.rows]
    records: list[dict[str, Any]] = []
    clock = Clock(device)

    def on_step(record: dict[str, Any]) -> None:
        clock.stop()
        records.append(record)

    with kept_memory():  # as `minilora finetune`
        ml.train(model, examples, train_config(work, len(task.batches)), on_step)
    checks = first_and_last([record["loss"] for record in records], records[0]["grad_norm"])
    tokens = [record["tokens"] for record in records]
    return Measurement(clock.seconds[task.warm_up :], tokens[task.warm_up :], peak.read(), checks)


def train_dense(task: Task) -> Measurement:
    """The same on a base that is not quantized, so that losses differ."""
    return replace(train(replace(task, work=replace(task.work, method="lora"))), checks={})


def answers(task: Task) -> tuple[Tensor, Tensor, list[int]]:
    """The last logits of the first row without the adapter and with it, and the tokens that follow with it."""
    model, ids = ml.load_model(task.model, task.work.dtype), torch.tensor([task.rows[0][0]])
    with torch.no_grad():
        plain = model(ids)[0, -ANSWERED:].clone()
        ml.load_adapter(model, task.adapter)
        return plain, model(ids)[0, -ANSWERED:].clone(), ml.generate(model, ids, ANSWERED)[0]
