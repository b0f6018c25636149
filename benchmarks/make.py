"""What works begin with, made by minilora: a random model, an adapter, and the order of rows."""

from pathlib import Path
from typing import Any

import torch

import minilora as ml
from benchmarks.ours import train_config
from benchmarks.work import ALPHA, RANK, Row, Task, Training, config_of, labelled
from minilora.models.checkpoint import build_model
from minilora.models.config import parse_config
from minilora.runs.memory import Plan, forecast
from minilora.runs.sampler import plan_steps


def random_model(config: dict[str, Any], directory: Path) -> None:
    """A model directory with random weights, in bfloat16, and some tokenizer, without which TRL does not start."""
    model = build_model(parse_config(config))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.02, generator=generator)
    ml.save_model(model.to(torch.bfloat16), directory, ml.load_tokenizer("minilora/builtin"))


def adapter_config(dora: bool) -> ml.LoraConfig:
    """On all linears of a block."""
    return ml.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", use_dora=dora)


def adapter(model: Path, directory: Path, dora: bool) -> None:
    """An adapter that everyone begins with; with B = 0 a mistake in scale or in A would not be seen in the loss."""
    found = ml.load_model(model)
    ml.attach(found, adapter_config(dora))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in found.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01, generator=generator)
    ml.save_adapter(found, directory)


def batches(rows: list[Row], work: Training, steps: int) -> list[list[Row]]:
    """The rows of each step, in the order in which minilora's loop takes them; peers are given the same."""
    plan = plan_steps(len(rows), train_config(work, steps))
    return [[rows[row] for micro_batch in step for row in micro_batch] for step in plan]


def forecast_bytes(task: Task) -> int:
    """Return minilora's forecast of the peak of a task of training."""
    work, config = task.work, train_config(task.work, len(task.batches))
    quantization = ml.QuantizeConfig("nf4" if work.method == "qlora" else "none")
    rows = [(len(tokens), labelled([(tokens, labels)])) for tokens, labels in task.rows]
    lora, dtype = adapter_config(work.method == "dora"), getattr(torch, work.dtype)
    config_json = parse_config(config_of(task.model))
    plan = Plan(config_json, lora, config, quantization, dtype, torch.device(task.device), rows)
    return forecast(plan)[config.gradient_checkpointing].peak
