"""Runs of the command `finetune` on a tiny model, and what lies in their directories."""

from __future__ import annotations

import json
import random
import signal

import minilora as ml
from minilora.cli.meter import Meter
from minilora.inputs import load_data
from minilora.settings import RunConfig

ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
CLASSES = (RunConfig, ml.QuantizeConfig, ml.LoraConfig, ml.DataConfig, ml.TrainConfig)
SETTINGS = {
    "lora_r": 3,
    "lora_alpha": 6,
    "lora_dropout": 0.2,
    "learning_rate": 0.01,
    "batch_size": 2,
    "gradient_accumulation_steps": 2,
    "save_steps": 2,
    "eval_split": 0.2,
    "epochs": 2,
    "general_data": "none",
}


def write_rows(path, count, choices=("yes", "no")):
    draw = random.Random(count)
    rows = []
    for choice in draw.choices(choices, k=count):
        question = " ".join(draw.choices(["the", "cat", "sea", "town"], k=draw.randint(1, 4)))
        rows.append({"prompt": f"{question}?", "completion": f" {choice}"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def contents(out, names=ADAPTER):
    return {name: (out / name).read_bytes() for name in names}


def everything(out):
    return {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def inputs(directory, **reading):
    tokenizer = ml.load_tokenizer(directory / "model")
    return load_data([str(directory / "rows.jsonl")], tokenizer, ml.DataConfig(**reading), ml.TrainConfig())


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def steps(out):
    return [record["step"] for record in metrics(out) if "eval_loss" not in record]


def starts(out):
    return [start["step"] for start in json.loads((out / "run.json").read_text())["starts"]]


def interrupt(monkeypatch, step, times=1):
    """Press Ctrl-C while this step is being reported."""
    report = Meter.__call__

    def press(meter, record):
        for _ in range(times if record["step"] == step else 0):
            signal.raise_signal(signal.SIGINT)
        return report(meter, record)

    monkeypatch.setattr(Meter, "__call__", press)
