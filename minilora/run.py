"""One fine-tuning run and its directory.

OUT/adapter_config.json  adapter_model.safetensors   the adapter, in PEFT's layout
    metrics.jsonl                                    a JSON object a step
    summary.json                                     before, after, totals
    run.json                                         the resolved configuration, versions, data, every start
    checkpoints/                                     what the run can go on from
    tokenizer.json …                                 the tokenizer's files
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch

from minilora.errors import ConfigError, FormatError, TrainingError
from minilora.hub import locate
from minilora.inputs import Data, load_data, load_general
from minilora.lora.attach import ParameterCount, attach, base_held, count_parameters
from minilora.lora.config import RENAMED, LoraConfig
from minilora.lora.files import base_quantization, save_adapter
from minilora.metrics import read_records
from minilora.model.checkpoint import load_model, read_config, resolve_dtype
from minilora.model.llama import Llama
from minilora.model.tokenizer import load_tokenizer
from minilora.quant.config import QuantizeConfig
from minilora.report import TensorBoard
from minilora.storage import BUILTIN, append_line, read_json, remove, write_json, write_text
from minilora.train.batch import groups, plan_steps
from minilora.train.config import WATCHING, DataConfig, TrainConfig, option
from minilora.train.data import Example
from minilora.train.diagnose import free_memory_bytes, peak_memory_bytes
from minilora.train.evaluate import EVAL_TOKENS, Drift, Scores, write_samples
from minilora.train.loop import Record, TrainResult, bookkeeping, train
from minilora.train.memory import Forecast, amount, forecast
from minilora.train.state import checkpoints, newest_step

Resume = Literal["auto", "never"]
Report = Literal["none", "tensorboard"]
Dtype = Literal["auto", "float32", "bfloat16"]
REMEDIES = 3  # that are named when a run does not fit
PACKAGES = ("minilora", "torch", "safetensors", "tokenizers", "numpy", "jinja2", "huggingface_hub")


@dataclass(frozen=True)
class RunConfig:
    """Where things are, and on what to compute."""

    model: str = option(BUILTIN, "directory of the base model, or org/name[@revision] of the Hugging Face hub")
    data: tuple[str, ...] = option(
        (BUILTIN,),
        "rows: .jsonl or .json files, also .gz; a directory with train.jsonl and perhaps valid.jsonl and test.jsonl; "
        "or a hub id",
    )
    out: str = option("minilora-run", "directory of the run")
    dtype: Dtype = option("auto", "number format of the base model; auto: the checkpoint's, where it is fast")
    device: str = option("auto", "cpu, cuda, mps; auto: the best there is")
    resume: Resume = option("auto", "go on with the run in --out, or refuse if there is one")
    general_data: str = option(
        BUILTIN,
        "general text, to see what the adapter costs on it: data with a field `text`; none: do not look",
        WATCHING,
    )
    report: Report = option("none", "also write what a run tells for tensorboard, in OUT/tensorboard", WATCHING)
    samples: int = option(2, "held-out prompts that each evaluation answers, to be looked at", WATCHING)

    def __post_init__(self) -> None:
        if not (isinstance(self.samples, int) and self.samples >= 0):
            raise ConfigError(f"RunConfig: samples is {self.samples!r}, need a whole number of at least 0")


@dataclass(frozen=True)
class Outcome:
    """What a finished or stopped run has to tell."""

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
        self.began = datetime.now(UTC).replace(microsecond=0)  # a chat template may write the date
        self.resolved = resolve(run, quantization, lora, reading, training)

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
        if not (isinstance(before, dict) and isinstance(starts, list) and starts and "data_sha256" in record):
            raise FormatError(f"{self.out / 'run.json'}: need config, starts and data_sha256; give another --out")
        now = json.loads(json.dumps(self.resolved))
        free = {*bookkeeping(self.training), "resume", "report", "samples"}
        before = {**default_settings(), **before}  # a run of an earlier version lacks what it could not choose
        different = [key for key in now if key not in free and before[key] != now[key]]
        if different:
            changes = ", ".join(f"{key} was {before.get(key)!r} and is {now[key]!r}" for key in different)
            raise TrainingError(f"{self.out}: holds a run with other settings ({changes}); give another --out")
        self.began = datetime.fromisoformat(starts[0]["time"])
        return newest_step(self.out / "checkpoints")

    def load(self, is_forced: bool = False) -> tuple[Llama, Data, ParameterCount]:
        """The model with a fresh adapter, and the data.

        Raises:
            TrainingError: it takes more memory than is free, and is not forced.
        """
        tokenizer = load_tokenizer(self.config.model).at(self.began.astimezone())
        data = load_data(self.config.data, tokenizer, self.reading, self.training)
        data = replace(data, general=load_general(self.config.general_data, data.tokenizer, self.reading))
        device = pick_device(self.config.device)
        if device.type != "meta" and not is_forced:
            self.check_memory(data, device, self.memory(data, device))
        model = load_model(self.config.model, self.config.dtype, device, self.quantization)
        attach(model, self.lora, seed=self.training.seed)
        return model, data, count_parameters(model)

    def memory(self, data: Data, device: torch.device, **changes: Any) -> Forecast:
        """What the micro-batch with the most tokens takes, and the largest evaluation, with some settings changed."""
        training = replace(self.training, **{key: changes[key] for key in changes if key in vars(self.training)})
        quantization = replace(self.quantization, quantize=changes.get("quantize", self.quantization.quantize))
        dtype = resolve_dtype(changes.get("dtype", self.config.dtype), self._source(), device)
        model = load_model(self.config.model, dtype, "meta", quantization)
        attach(model, self.lora)

        def lengths(examples: Sequence[Example]) -> list[int]:
            return [min(len(example.tokens), changes.get("max_length", len(example.tokens))) for example in examples]

        trained = lengths(data.train)
        batches = [rows for micro_batches in plan_steps(trained, training) for rows in micro_batches]
        batch = max(batches, key=lambda rows: sum(trained[row] for row in rows))
        labelled = sum(min(data.train[row].labelled, trained[row]) for row in batch)
        evaluated = [
            [found[row] for row in rows]
            for found in map(lengths, (data.valid, data.test, data.general))
            for rows in groups(found, range(len(found)), EVAL_TOKENS)
        ]
        return forecast(
            model, [trained[row] for row in batch], labelled, training, device, max(evaluated, key=sum, default=())
        )

    def check_memory(self, data: Data, device: torch.device, told: Forecast) -> None:
        """Refuse a run that cannot fit, as was `told` of it, and say what would help, the cheapest first.

        Raises:
            TrainingError: it takes more memory than is free.
        """
        free, needed = free_memory_bytes(device), told.peak
        if free is None or needed <= free:
            return
        lines = [f"the run needs {amount(needed)} of memory, and {amount(free)} are free on {device}"]
        for flags, changes, cost in self._remedies(data):
            if len(lines) <= REMEDIES and (peak := self.memory(data, device, **changes).peak) < needed:
                lines.append(f"{flags} brings it to {amount(peak)}; {cost}")
        raise TrainingError("\n  ".join([*lines, "--force runs all the same"]))

    def _remedies(self, data: Data) -> Iterator[tuple[str, dict[str, Any], str]]:
        """Flags that may save memory, what they change, and what they cost: the cheapest first."""
        training, more = self.training, 2 * self.training.gradient_accumulation_steps
        if training.batch_tokens is None:
            name, fewer = "batch_size", (min(training.batch_size, len(data.train)) + 1) // 2
        else:
            name, fewer = "batch_tokens", (training.batch_tokens + 1) // 2
        flags = f"--{name.replace('_', '-')} {fewer} --gradient-accumulation-steps {more}"
        yield flags, {name: fewer, "gradient_accumulation_steps": more}, "the gradient is the same"
        if training.recompute != "block":
            yield "--recompute block", {"recompute": "block"}, "slower, the result is the same"
        if self.quantization.quantize == "none" and not self._source().get("quantization_config"):
            yield "--quantize nf4", {"quantize": "nf4"}, "a little slower, and the base is rounded"
        yield "--dtype bfloat16", {"dtype": "bfloat16"}, "the base and the computation are rounded"
        half = (max(len(example.tokens) for example in data.train) + 1) // 2
        yield f"--max-length {half}", {"max_length": half}, "longer rows lose what they end in"

    def _source(self) -> Mapping[str, Any]:
        return read_config(locate(self.config.model, "model").path).source

    def start(self, model: Llama, data: Data, step: int) -> None:
        """Record this start in run.json, and drop the metrics of steps that will be done again.

        Raises:
            TrainingError: the data is not what the run began with, or the base model is quantized otherwise.
        """
        path = self.out / "run.json"
        for checkpoint in checkpoints(self.out / "checkpoints")[-1:]:
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
        start = {"time": time.isoformat(), "step": step}
        start |= {"device": str(weight.device), "dtype": str(weight.dtype).removeprefix("torch.")}
        starts = [*earlier["starts"], start]
        prompts = "template" if data.train.conversations else "plain"  # how the adapter wants to be asked
        record = {"config": self.resolved, "versions": versions, "data_sha256": data.files, "prompts": prompts}
        record["starts"] = starts
        write_json(path, record)
        if self.config.report == "tensorboard":
            self.board = TensorBoard(self.out / "tensorboard", step)
        for left in (self.out / "checkpoints").glob(".*.tmp"):  # by a writer that was killed
            remove(left)
        metrics = self.out / "metrics.jsonl"
        records = read_records(metrics) if metrics.is_file() else []
        write_text(metrics, "".join(f"{json.dumps(record)}\n" for record in records if record["step"] <= step))

    def train(self, model: Llama, data: Data, on_step: Callable[[Record], bool | None]) -> TrainResult:
        """The training itself; records go to metrics.jsonl, to `--report`, and to `on_step`.

        An evaluation's record gets "samples", what the model writes for the first held-out prompts.
        """

        def record(values: Record) -> bool | None:
            if "eval_loss" in values:
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
            if self.board:
                self.board.close()

    def finish(self, model: Llama, data: Data, outcome: Outcome) -> None:
        """Write the adapter, the tokenizer's files and, last, the summary that marks the run as finished."""
        save_adapter(model, self.out)
        data.tokenizer.save(self.out)
        summary = {
            "before": asdict(outcome.before),
            "after": asdict(outcome.after),
            "general": asdict(outcome.drift) if outcome.drift else None,
            "steps": outcome.result.steps,
            "kept_step": outcome.result.kept,
            "tokens": outcome.result.tokens,
            "seconds": outcome.result.seconds,
            "peak_memory_bytes": peak_memory_bytes(next(model.parameters()).device),
        }
        write_json(self.out / "summary.json", summary)


def resolve(
    run: RunConfig, quantization: QuantizeConfig, lora: LoraConfig, reading: DataConfig, training: TrainConfig
) -> dict[str, Any]:
    """All fields, by the names of their flags."""
    values = {**asdict(run), **asdict(quantization), **asdict(lora), **asdict(reading), **asdict(training)}
    return {RENAMED.get(name, name): value for name, value in values.items()}


def default_settings() -> dict[str, Any]:
    """What `resolve` makes of all defaults, as run.json has it."""
    defaults = resolve(RunConfig(), QuantizeConfig(), LoraConfig(), DataConfig(), TrainConfig())
    return json.loads(json.dumps(defaults))


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
