"""One fine-tuning run and its directory.

OUT/adapter_config.json  adapter_model.safetensors   the adapter, in PEFT's layout; or, with --method full,
    config.json  model….safetensors                  the whole model
    metrics.jsonl                                    a JSON object a step
    summary.json                                     before, after, totals
    run.json                                         the resolved configuration, versions, data, every start
    checkpoints/                                     what the run can go on from
    tokenizer.json …                                 the tokenizer's files
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path

import torch

from minilora.adapters.attach import attach
from minilora.adapters.config import RENAMED, LoraConfig
from minilora.adapters.files import save_adapter
from minilora.adapters.find import ParameterCount, base_held, count_parameters
from minilora.adapters.layout import base_quantization
from minilora.definition import is_plain
from minilora.errors import ConfigError, FormatError, TrainingError
from minilora.llama import Llama
from minilora.models.bitsandbytes import QuantizeConfig
from minilora.models.checkpoint import read_config, resolve_dtype, save_model
from minilora.models.classifier import Classifier, grow_vocabulary, load_for
from minilora.models.config import UNITS
from minilora.models.hub import locate
from minilora.models.tokenizer import load_tokenizer
from minilora.runs.checkpoints import bookkeeping, checkpoints, newest_step
from minilora.runs.config import DataConfig, RunConfig, TrainConfig, default_settings, resolve
from minilora.runs.evaluate import Drift, Scores, write_samples
from minilora.runs.inputs import Data, load_data, load_general
from minilora.runs.loop import Record, TrainResult, train
from minilora.runs.machine import choose_threads, peak_memory_bytes
from minilora.runs.memory import Forecast, Plan, fit
from minilora.runs.metrics import TensorBoard, read_records
from minilora.runs.objective import start_losses
from minilora.storage import BUILTIN, append_line, holds_files, read_json, remove, write_json, write_text

PACKAGES = ("minilora", "torch", "safetensors", "tokenizers", "numpy", "jinja2", "huggingface_hub")


@dataclass(frozen=True)
class Outcome:
    """The result of a finished run: its training, the scores before and after, and the drift."""

    result: TrainResult
    before: Scores
    after: Scores
    drift: Drift | None


class Run:
    """A run in its directory, from `prepare` to `finish`."""

    def __init__(
        self,
        run: RunConfig,
        quantization: QuantizeConfig,
        lora: LoraConfig,
        reading: DataConfig,
        training: TrainConfig,
    ):
        # Names that will mean the same later: those of repositories get the commit.
        data = tuple(locate(name, "dataset").name for name in run.data)
        general = run.general_data if run.general_data == "none" else locate(run.general_data, "dataset").name
        run = replace(run, model=locate(run.model, "model").name, data=data, general_data=general)
        self.config, self.quantization, self.lora = run, quantization, lora
        self.reading, self.training = reading, training
        self.out = Path(run.out)
        self.board: TensorBoard | None = None
        self.has_begun = False  # True where the directory holds an earlier start
        self.threads: int | None = None  # the number that the earlier start computed with
        self.began = datetime.now(UTC).replace(microsecond=0)  # a chat template may write the date
        self.base_config = read_config(locate(run.model, "model").path)
        self.resolved = resolve(run, quantization, lora, reading, training)
        self.unit = UNITS.get(lora.task_type)
        self._check_task()
        if self.is_full:
            self._check_full()

    @property
    def is_full(self) -> bool:
        """Are all weights trained, and not an adapter?"""
        return self.config.method == "full"

    def _check_task(self) -> None:
        """Refuse a task that is not known here, and what has no effect on it.

        Raises:
            ConfigError: it is another task, or the model is made for another; or general text for a classifier.
        """
        task, held = self.lora.task_type, self.base_config.unit
        if task not in (None, "CAUSAL_LM", *UNITS):
            raise ConfigError(f"--task {task}: accepted are CAUSAL_LM, {', '.join(map(str, UNITS))}")
        if held not in (None, self.unit):
            wanted = next(name for name, unit in UNITS.items() if unit == held)
            raise ConfigError(f"{self.config.model}: is a classifier; give --task {wanted}")
        if self.unit and self.config.general_data not in (BUILTIN, "none"):
            raise ConfigError("--general-data: without effect on a classifier; leave it out")

    def _check_full(self) -> None:
        """Refuse what all weights cannot be trained with.

        Raises:
            ConfigError: four bits, bfloat16, or settings of an adapter.
        """
        defaults, adapter = LoraConfig(), {field.name for field in fields(LoraConfig)} - {"task_type"}
        idle = [name for name in adapter if getattr(self.lora, name) != getattr(defaults, name)]
        idle += ["loraplus_lr_ratio"] if self.training.loraplus_lr_ratio is not None else []
        flags = sorted(f"--{RENAMED.get(name, name).replace('_', '-')}" for name in idle)
        bad = [f"{', '.join(flags)}: without effect, since there is no adapter"] if flags else []
        if self.quantization.quantize != "none" or self.base_config.source.get("quantization_config"):
            bad.append("weights in four bits cannot be trained; --method lora trains an adapter on them")
        if self.config.dtype == "bfloat16":
            bad.append(
                "--dtype bfloat16: most updates of a weight are too small to change it; float32 is what there is"
            )
        if bad:
            raise ConfigError("--method full: " + "; ".join(bad))

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
        record = read_json(self.out / "run.json")
        before, starts = record.get("config"), record.get("starts")
        first = starts[0] if isinstance(starts, list) and starts and isinstance(starts[0], dict) else {}
        if not (isinstance(before, dict) and "time" in first and "data_sha256" in record):
            raise FormatError(f"{self.out / 'run.json'}: need config, starts and data_sha256; give another --out")
        now = json.loads(json.dumps(self.resolved))
        free = {*bookkeeping(self.training), "resume", "report", "samples"}
        before = {**default_settings(), **before}  # a run of an earlier version lacks what it could not choose
        different = [key for key in now if key not in free and before[key] != now[key]]
        if different:
            changes = ", ".join(f"{key} was {before.get(key)!r} and is {now[key]!r}" for key in different)
            raise TrainingError(f"{self.out}: holds a run with other settings ({changes}); give another --out")
        if first.get("plain", False) != is_plain():
            raise TrainingError(f"{self.out}: the run began {'without' if is_plain() else 'with'} --plain; do the same")
        self.began = datetime.fromisoformat(first["time"])
        self.threads, self.has_begun = first.get("threads"), True
        return newest_step(self.out / "checkpoints")

    def load_data(self) -> Data:
        """Read the rows of all splits and encode them as the model's tokenizer and the settings say."""
        tokenizer = load_tokenizer(self.config.model).with_tokens(self.config.add_tokens).at(self.began.astimezone())
        labels = self.base_config.labels
        data = load_data(self.config.data, tokenizer, self.reading, self.training, self.unit, labels)
        if self.unit is None:
            data = replace(data, general=load_general(self.config.general_data, data.tokenizer, self.reading))
        return data

    def load_model(self, data: Data, device: torch.device | str) -> Llama | Classifier:
        """Load the base model, quantized as it is read, with a head for the data's classes and room for new tokens."""
        seed = self.training.seed
        model = load_for(self.unit, data.labels, self.config.model, self.dtype, device, self.quantization, seed)
        grow_vocabulary(model, max(self._new_tokens(data), default=-1) + 1)
        return model

    def attach(self, model: Llama | Classifier, data: Data) -> ParameterCount:
        """Attach a fresh adapter, unless all weights are trained; return how many parameters are."""
        if not self.is_full:
            losses = start_losses(model, data.train, self.training)
            attach(model, self.lora_for(data), seed=self.training.seed, losses=losses)
        return count_parameters(model)

    def fit(self, data: Data, device: torch.device) -> tuple[Plan, Forecast]:
        """Forecast the run's memory on a device, and choose how it recomputes if that was left open."""
        config = self.base_config
        splits = (data.valid, data.test, data.general)
        plan = Plan(
            replace(config, vocab_size=max(config.vocab_size, *(token + 1 for token in self._new_tokens(data)), 0)),
            None if self.is_full else self.lora_for(data),
            self.training,
            self.quantization,
            resolve_dtype(self.dtype, config.source, device),
            device,
            [(len(example.tokens), example.labelled) for example in data.train],
            [[len(example.tokens) for example in split] for split in splits],
            len(config.labels if config.unit else data.labels),
        )
        plan, found = fit(plan)
        self.training = plan.training
        return plan, found

    def lora_for(self, data: Data) -> LoraConfig:
        """The adapter's config; the rows of new tokens are trained, too.

        Raises:
            ConfigError: there are new tokens, and `trainable_token_indices` names modules.
        """
        new, wanted = self._new_tokens(data), self.lora.trainable_token_indices
        if new and isinstance(wanted, Mapping):
            raise ConfigError("--add-tokens needs --trainable-token-indices to be ids, or left out")
        return replace(self.lora, trainable_token_indices=(*(wanted or ()), *new)) if new else self.lora

    def _new_tokens(self, data: Data) -> list[int]:
        return [token for text in self.config.add_tokens if (token := data.tokenizer.token_id(text)) is not None]

    @property
    def dtype(self) -> str:
        return "float32" if self.is_full else self.config.dtype

    def start(self, model: Llama | Classifier, data: Data, step: int) -> None:
        """Record this start in run.json, and drop the metrics of steps that will be done again.

        Raises:
            TrainingError: the data is not what the run began with, or the base model is quantized otherwise.
        """
        path = self.out / "run.json"
        for checkpoint in [] if self.is_full else checkpoints(self.out / "checkpoints")[-1:]:
            if base_quantization(checkpoint) != base_held(model):
                raise TrainingError(
                    f"{self.config.model}: is not quantized as when {checkpoint} was written; give another --out"
                )
        earlier = read_json(path) if path.is_file() else {"starts": [], "data_sha256": data.files}
        if earlier["data_sha256"] != data.files:
            raise TrainingError(f"{self.out}: the data has changed since the run began; give another --out")
        versions = {name: importlib.metadata.version(name) for name in PACKAGES} | {"python": platform.python_version()}
        weight = model.model.embed_tokens.weight
        time = datetime.now(UTC).replace(microsecond=0) if earlier["starts"] else self.began
        start = {
            "time": time.isoformat(),
            "step": step,
            "device": str(weight.device),
            "dtype": str(weight.dtype).removeprefix("torch."),
            "recompute": self.training.recompute,
            "threads": torch.get_num_threads(),
            "plain": is_plain(),
        }
        record = {
            "config": self.resolved,
            "versions": versions,
            "data_sha256": data.files,
            "prompts": "template" if data.train.conversations else "plain",  # how the adapter wants to be asked
            "starts": [*earlier["starts"], start],
        }
        write_json(path, record)
        if self.config.report == "tensorboard":
            self.board = TensorBoard(self.out / "tensorboard", step)
        for left in (self.out / "checkpoints").glob(".*.tmp"):  # by a writer that was killed
            remove(left)
        metrics = self.out / "metrics.jsonl"
        records = read_records(metrics) if metrics.is_file() else []
        write_text(metrics, "".join(f"{json.dumps(record)}\n" for record in records if record["step"] <= step))

    def choose_threads(self, model: Llama | Classifier, data: Data) -> int | None:
        """Set the faster number of threads, see `minilora.runs.machine`; return it, or None if it was left alone.

        A run that goes on keeps the number that it began with, because another one may round otherwise.
        """
        if not self.has_begun:
            return choose_threads(model, data.train, self.training)
        if self.threads is not None and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(self.threads)
        return None

    def train(self, model: Llama | Classifier, data: Data, on_step: Callable[[Record], bool | None]) -> TrainResult:
        """The training itself; records go to metrics.jsonl, to `--report`, and to `on_step`. No gradient is kept.

        An evaluation's record gets "samples", what the model writes for the first held-out prompts.
        """

        def record(values: Record) -> bool | None:
            if "eval_loss" in values and isinstance(model, Llama):
                values = {**values, "samples": write_samples(model, data.tokenizer, data.valid[: self.config.samples])}
            stops = on_step(values)
            if "eval_loss" in values or values["step"] % self.training.logging_steps == 0:
                append_line(self.out / "metrics.jsonl", {k: v for k, v in values.items() if k != "total_steps"})
                if self.board:
                    self.board(values)
            return stops

        try:
            return train(model, data.train, self.training, record, data.valid, self.out / "checkpoints")
        finally:
            model.zero_grad()
            if self.board:
                self.board.close()

    def finish(self, model: Llama | Classifier, data: Data, outcome: Outcome) -> None:
        """Write the result, the tokenizer's files and, last, the summary that marks the run as finished."""
        if self.is_full:
            save_model(model, self.out)
        else:
            save_adapter(model, self.out)
        data.tokenizer.save(self.out)
        summary = {
            "before": outcome.before.record(),
            "after": outcome.after.record(),
            "general": asdict(outcome.drift) if outcome.drift else None,
            "steps": outcome.result.steps,
            "kept_step": outcome.result.kept,
            "tokens": outcome.result.tokens,
            "seconds": outcome.result.seconds,
            "peak_memory_bytes": peak_memory_bytes(next(model.parameters()).device),
        }
        write_json(self.out / "summary.json", summary)


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA, else MPS, else the CPU.

    Raises:
        ConfigError: there is no such device here.
    """
    if name != "auto":
        with suppress(RuntimeError, AssertionError):  # AssertionError: a build of torch without CUDA
            if not (empty := torch.empty(0, device=name)).is_meta:
                return empty.device
        raise ConfigError(f"device {name!r} cannot be used here; need auto, cpu, cuda, cuda:N or mps, if it is there")
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
