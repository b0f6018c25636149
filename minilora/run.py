"""One fine-tuning run and its directory.

OUT/adapter_config.json  adapter_model.safetensors   the adapter, in PEFT's layout
    metrics.jsonl                                    a JSON object a step
    summary.json                                     before, after, totals
    run.json                                         the resolved configuration, versions, data, every start
    checkpoints/                                     what the run can go on from
    tokenizer.json …                                 the tokenizer's files
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import torch

from minilora.errors import ConfigError, DataError, TrainingError
from minilora.lora.attach import ParameterCount, attach, count_parameters, disable_adapter
from minilora.lora.config import LoraConfig
from minilora.lora.files import save_adapter
from minilora.model.checkpoint import load_model
from minilora.model.llama import Llama
from minilora.model.tokenizer import Tokenizer, load_tokenizer
from minilora.storage import BUILTIN, append_line, read_json, read_text, write_json, write_text
from minilora.train.config import TrainConfig, option
from minilora.train.data import Dataset, encode_rows, find_splits, read_rows
from minilora.train.diagnose import peak_memory_bytes
from minilora.train.evaluate import Choice, choice_accuracy, find_choices, held_out_loss
from minilora.train.loop import BOOKKEEPING, Record, TrainResult, train
from minilora.train.state import newest_step

Resume = Literal["auto", "never"]
Dtype = Literal["auto", "float32", "bfloat16"]
PACKAGES = ("minilora", "torch", "safetensors", "tokenizers", "numpy", "jinja2")


@dataclass(frozen=True)
class RunConfig:
    """Where things are, and on what to compute."""

    model: str = option(BUILTIN, "directory of the base model")
    data: str = option(
        BUILTIN, "rows: a .json or .jsonl file, or a directory with train.jsonl, valid.jsonl, test.jsonl"
    )
    out: str = option("minilora-run", "directory of the run")
    dtype: Dtype = option("auto", "number format of the base model; auto: the checkpoint's, where it is fast")
    device: str = option("auto", "cpu, cuda, mps; auto: the best there is")
    resume: Resume = option("auto", "go on with the run in --out, or refuse if there is one")


@dataclass(frozen=True)
class Data:
    """What a run learns from; what it is watched with while it learns; what it is judged by in the end."""

    train: Dataset
    valid: Dataset
    test: Dataset
    choices: list[Choice] | None
    files: dict[str, str]


@dataclass(frozen=True)
class Scores:
    """Held-out loss, and accuracy where the data has choices; both None if nothing is held out."""

    loss: float | None
    accuracy: float | None


@dataclass(frozen=True)
class Outcome:
    """What a finished or stopped run has to tell."""

    result: TrainResult
    before: Scores
    after: Scores


class Run:
    """A run in its directory, from `prepare` to `finish`."""

    def __init__(self, run: RunConfig, lora: LoraConfig, training: TrainConfig):
        self.config, self.lora, self.training = run, lora, training
        self.out = Path(run.out)
        self.resolved = {**asdict(run), **asdict(lora), **asdict(training)}
        self.resolved["lora_r"] = self.resolved.pop("r")

    def prepare(self) -> int:
        """Refuse a directory that holds something else; return the step that the run goes on from.

        Raises:
            TrainingError: the directory holds a finished run, another run, or no run but files.
        """
        if not holds_files(self.out):
            return 0
        if not (self.out / "run.json").is_file():
            raise TrainingError(f"{self.out}: has files, but not of a run; give another --out")
        if (self.out / "summary.json").is_file():
            raise TrainingError(f"{self.out}: holds a finished run; give another --out")
        if self.config.resume == "never":
            raise TrainingError(f"{self.out}: holds a run, and --resume never was given; give another --out")
        before = read_json(self.out / "run.json").get("config", {})
        now = json.loads(json.dumps(self.resolved))
        free = {*BOOKKEEPING, "resume"} - {"eval_split"}  # which decides what the training rows are
        different = [key for key in now if key not in free and before.get(key) != now[key]]
        if different:
            changes = ", ".join(f"{key} was {before.get(key)!r} and is {now[key]!r}" for key in different)
            raise TrainingError(f"{self.out}: holds a run with other settings ({changes}); give another --out")
        return newest_step(self.out / "checkpoints")

    def load(self) -> tuple[Llama, Tokenizer, Data, ParameterCount]:
        """The model with a fresh adapter, its tokenizer, and the data."""
        tokenizer = load_tokenizer(self.config.model)
        data = load_data(self.config.data, tokenizer, self.training)
        model = load_model(self.config.model, self.config.dtype, pick_device(self.config.device))
        attach(model, self.lora, seed=self.training.seed)
        return model, tokenizer, data, count_parameters(model)

    def start(self, model: Llama, data: Data, step: int) -> None:
        """Record this start in run.json, and drop the metrics of steps that will be done again.

        Raises:
            TrainingError: the data is not what the run began with.
        """
        path = self.out / "run.json"
        earlier = read_json(path) if path.is_file() else {"starts": [], "data_sha256": data.files}
        if earlier["data_sha256"] != data.files:
            raise TrainingError(f"{self.out}: the data has changed since the run began; give another --out")
        versions = {name: importlib.metadata.version(name) for name in PACKAGES} | {"python": platform.python_version()}
        weight = model.model.embed_tokens.weight
        start = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "step": step}
        start |= {"device": str(weight.device), "dtype": str(weight.dtype).removeprefix("torch.")}
        starts = [*earlier["starts"], start]
        record = {"config": self.resolved, "versions": versions, "data_sha256": data.files, "starts": starts}
        write_json(path, record)
        metrics = self.out / "metrics.jsonl"
        lines = read_text(metrics).splitlines() if metrics.is_file() else []
        write_text(metrics, "".join(f"{line}\n" for line in lines if _step_of(line) <= step))

    def train(self, model: Llama, data: Data, on_step: Callable[[Record], bool | None]) -> TrainResult:
        """The training itself; records go to metrics.jsonl and to `on_step`."""

        def record(values: Record) -> bool | None:
            stops = on_step(values)
            if "eval_loss" in values or values["step"] % self.training.logging_steps == 0:
                append_line(self.out / "metrics.jsonl", {k: v for k, v in values.items() if k != "total_steps"})
            return stops

        return train(model, data.train, self.training, record, data.valid, self.out / "checkpoints")

    def finish(self, model: Llama, tokenizer: Tokenizer, outcome: Outcome) -> None:
        """Write the adapter, the tokenizer's files and, last, the summary that marks the run as finished."""
        save_adapter(model, self.out)
        tokenizer.save(self.out)
        summary = {
            "before": asdict(outcome.before),
            "after": asdict(outcome.after),
            "steps": outcome.result.steps,
            "tokens": outcome.result.tokens,
            "seconds": outcome.result.seconds,
            "peak_memory_bytes": peak_memory_bytes(next(model.parameters()).device),
        }
        write_json(self.out / "summary.json", summary)


def load_data(name_or_path: str, tokenizer: Tokenizer, config: TrainConfig) -> Data:
    """Training, validation and test rows. Without files of their own, a share of the training rows is held out.

    Raises:
        DataError: a row that cannot be used, or there is no training file.
    """
    files = find_splits(name_or_path)
    if "train" not in files:
        raise DataError(f"{name_or_path}: there is no train.jsonl; found {sorted(files)}")
    encoded = {
        split: encode_rows(read_rows(path), tokenizer, config.train_on, config.max_length)
        for split, path in files.items()
    }
    if len(files) == 1 and config.eval_split and len(encoded["train"]) > 1:
        whole = encoded["train"]
        shuffled = random.Random(config.seed).sample(whole.examples, len(whole))
        held = max(1, int(config.eval_split * len(shuffled)))
        encoded = {"train": replace(whole, examples=tuple(shuffled[held:])), "test": Dataset(tuple(shuffled[:held]))}
    test = encoded.get("test") or encoded.get("valid") or Dataset(())
    valid = encoded.get("valid") or test
    choices = find_choices([*encoded["train"], *test])
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files.values()}
    return Data(encoded["train"], valid, test, choices, digests)


def evaluate(model: Llama, examples: Dataset, choices: Sequence[Choice] | None) -> Scores:
    """Loss and accuracy of the model as it is."""
    if not examples:
        return Scores(None, None)
    accuracy = choice_accuracy(model, examples, choices) if choices else None
    return Scores(held_out_loss(model, examples), accuracy)


def evaluate_base(model: Llama, examples: Dataset, choices: Sequence[Choice] | None) -> Scores:
    """The same without the adapter."""
    with disable_adapter(model):
        return evaluate(model, examples, choices)


def holds_files(out: Path) -> bool:
    """Is there anything in a directory to write to, but for what a killed writer left?

    Raises:
        ConfigError: it is a file.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out}: is a file; give a directory as --out")
    return out.exists() and any(not re.fullmatch(r"\..*\.tmp", path.name) for path in out.iterdir())


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA, else MPS, else the CPU.

    Raises:
        ConfigError: there is no such device here.
    """
    if name != "auto":
        try:
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError) as error:  # AssertionError: a build of torch without CUDA
            raise ConfigError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _step_of(line: str) -> float:
    """The step of a line of metrics.jsonl; a line that was cut off by a crash counts as after everything."""
    try:
        return float(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")
