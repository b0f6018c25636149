"""Runs of the command `finetune` on a tiny model, and what lies in their directories."""

import io
import json
import random
import shutil
import signal
import sys
from datetime import datetime

import torch

import minilora as ml
from minilora import cli
from minilora.files import MANIFEST
from minilora.models import generate
from minilora.runs.checkpoints import checkpoints
from minilora.runs.inputs import read_data
from minilora.runs.reports import ProgressBar
from minilora.runs.settings import RunConfig, Settings
from tests.files import write_adapter
from tests.models import tiny_model
from tests.text import CHATML, CLOSE, write_tokenizer

QUICK = ("--general-data=none", "--force")  # what takes longer than training a tiny model: general text, a forecast
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
    "samples": 0,  # which would take longer than training
}
NO_ADAPTER = {"lora_r": None, "lora_alpha": None, "lora_dropout": None}


def flags_of(command):
    """The names of a command's flags, with underscores."""
    return {action.dest for action in cli.command_parser(command)._actions}


def write_rows(path, count, choices=("yes", "no")):
    draw = random.Random(count)
    rows = []
    for choice in draw.choices(choices, k=count):
        question = " ".join(draw.choices(["the", "cat", "sea", "town"], k=draw.randint(1, 4)))
        rows.append({"prompt": f"{question}?", "completion": f" {choice}"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_inputs(directory, dtype=torch.float32):
    """Write a model of two layers with its tokenizer, 23 rows to learn from and two of general text; the directory."""
    tokenizer = write_tokenizer(directory / "model")
    ml.save_model(tiny_model(dtype=dtype, vocab_size=400, num_hidden_layers=2), directory / "model", tokenizer)
    write_rows(directory / "rows.jsonl", 23)
    (directory / "general.jsonl").write_text('{"text": "the town by the sea"}\n{"text": "what is the capital?"}\n')
    return directory


def words(directory, out, **changes):
    """The command line of a run on `write_inputs`; None leaves a flag out. Its memory is not forecast, to save time."""
    flags = {"model": directory / "model", "data": directory / "rows.jsonl", "out": out, "force": True}
    given = {name: value for name, value in {**flags, **SETTINGS, **changes}.items() if value is not None}
    return ["finetune", *(f"--{k.replace('_', '-')}" + ("" if v is True else f"={v}") for k, v in given.items())]


def finetune(directory, out, **changes):
    return cli.main(words(directory, out, **changes))


def unfinished(whole, out, step, **config):
    """A copy of a finished run, with all its checkpoints, as if it had been killed after this one; the directory."""
    shutil.copytree(whole, out, dirs_exist_ok=True)
    for name in ("summary.json", MANIFEST, *ADAPTER, "config.json", "model.safetensors"):
        (out / name).unlink(missing_ok=True)
    for checkpoint in checkpoints(out / "checkpoints"):
        if int(checkpoint.name.removeprefix("step-")) > step:
            shutil.rmtree(checkpoint)
    record = json.loads((out / "run.json").read_text())
    record["config"] |= {"out": str(out), **config}
    (out / "run.json").write_text(json.dumps(record))
    return out


def contents(out, names=ADAPTER):
    return {name: (out / name).read_bytes() for name in names}


def everything(out):
    return {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def runner(directory, capsys, monkeypatch):
    """Go to a directory; a function that runs a command there, which must end with `status`: what it printed."""
    monkeypatch.chdir(directory)

    def run(*words, status=0):
        capsys.readouterr()
        assert cli.main([str(word) for word in words]) == status
        return capsys.readouterr()

    return run


def type_in(monkeypatch, typed=b""):
    """Text or bytes on standard input, which is no terminal."""
    typed = typed.encode() if isinstance(typed, str) else typed
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed), encoding="utf-8"))


def write_chat_models(directory):
    """Two models, one with a chat template, and an adapter of each."""
    for name, options in (("model", {}), ("chat", {"template": CHATML, "eos": CLOSE, "post": "bos"})):
        tokenizer = write_tokenizer(directory / name, **options)
        sizes = {"vocab_size": 400, "num_hidden_layers": 2, "max_position_embeddings": 256}
        ml.save_model(tiny_model(seed=1, dtype=torch.float32, **sizes), directory / name, tokenizer)
        write_adapter(ml.load_model(directory / name), directory / f"{name}-adapter", r=3, lora_alpha=6)
    return directory


def inputs(directory, *rows, model="model", training=None, eval_split=0.05, **reading):
    """The data of a run on a model and rows in `directory`."""
    paths = tuple(str(directory / path) for path in rows or ("rows.jsonl",))
    run = RunConfig(model=str(directory / model), data=paths, general_data="none", eval_split=eval_split)
    settings = Settings(run, data=ml.DataConfig(**reading), training=training or ml.TrainConfig())
    return read_data(settings, (), datetime.now())


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def steps(out):
    return [record["step"] for record in metrics(out) if "eval_loss" not in record]


def summary(out):
    return json.loads((out / "summary.json").read_text())


def starts(out):
    return [start["step"] for start in json.loads((out / "run.json").read_text())["starts"]]


def interrupt(monkeypatch, step, times=1, number=signal.SIGINT):
    """Press Ctrl-C, or send another signal, while this step is being reported."""
    report = ProgressBar.__call__

    def press(bar, record):
        for _ in range(times if record["step"] == step else 0):
            signal.raise_signal(number)
        return report(bar, record)

    monkeypatch.setattr(ProgressBar, "__call__", press)


def interrupt_generation(monkeypatch, call):
    """Press Ctrl-C when the model computes the next token for that time."""
    calls = []

    def press(*arguments, function=generate._next_logits):
        calls.append(arguments)
        if len(calls) == call:
            raise KeyboardInterrupt
        return function(*arguments)

    monkeypatch.setattr(generate, "_next_logits", press)
