"""The directory of a fine-tuning run.

OUT/adapter_config.json  adapter_model.safetensors   the adapter, in PEFT's layout
    summary.json                                     before, after, totals
    README.md                                        the card
    held_out.jsonl                                   held-out rows, some with the answers of base and result
    tokenizer.json …                                 the tokenizer's files
    minilora-manifest.json                           sizes and hashes of the files above, once the run is finished
    metrics.jsonl                                    a JSON object a step
    run.json                                         the resolved configuration, versions, data, every start
    checkpoints/                                     from which the run can be resumed
    .lock                                            the process that is at work there
"""

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from minilora.adapters.files import save_adapter_files
from minilora.adapters.layout import CONFIG_FILE, WEIGHTS_FILE
from minilora.definition import is_plain
from minilora.errors import FormatError, TrainingError
from minilora.files import publishing, read_json, replacing, sha256_of, write_json
from minilora.llama import Llama, LlamaConfig
from minilora.models.hub import Location
from minilora.models.prompts import PROMPT_FILES, Prompts, copy_prompt_files
from minilora.models.tokenizer import TOKENIZER_FILES, Tokenizer
from minilora.runs import checkpoints, processes
from minilora.runs.cards import write_cards
from minilora.runs.evaluate import Forgetting, Scores
from minilora.runs.inputs import Data
from minilora.runs.lock import holds_files, locked
from minilora.runs.loop import Record
from minilora.runs.memory import Plan
from minilora.runs.reports import Tracker
from minilora.runs.settings import Settings

HASHED = ("out", "model", "adapter", "data", "eval_data")  # paths may change: contents are compared by their hashes
MAY_CHANGE = ("resume", "shard", "report", "samples", "general_data")  # settings, with those of `BOOKKEEPING`
WHOLE = 2**29  # bytes of a file up to which all of it is hashed
PIECES = 1024  # of a larger file that are hashed
PIECE = 2**16  # bytes of one
PACKAGES = ("minilora", "torch", "safetensors", "tokenizers", "numpy", "jinja2", "huggingface_hub")


@dataclass(frozen=True)
class Base:
    """The model and the adapters, one at most, that a run starts from."""

    location: Location
    adapters: tuple[Path, ...]
    config: LlamaConfig


@dataclass(frozen=True)
class RunHistory:
    """The earlier starts of a run, as its directory records them; of a new run, what it begins with."""

    dtype: str  # of the base: "auto" differs between machines, so a run keeps that of its first start
    began: datetime = field(default_factory=lambda: datetime.now(UTC).replace(microsecond=0))  # the first start
    starts: tuple[dict[str, Any], ...] = ()  # as run.json has them
    data_sha256: Mapping[str, str] = field(default_factory=dict)
    step: int = 0  # of the newest checkpoint that is whole, from which the run resumes
    damaged: tuple[str, ...] = ()  # what is wrong with newer ones
    is_finished: bool = False


@dataclass(frozen=True)
class Run:
    """A run that is about to start."""

    settings: Settings  # what it is asked for
    base: Base
    history: RunHistory
    data: Data
    plan: Plan  # what it does


@dataclass(frozen=True)
class RunSummary:
    """The results of a run, as in summary.json."""

    before: Scores
    start: Scores | None  # of the adapter that the run continues
    after: Scores
    general: Forgetting | None
    steps: int
    kept_step: int
    tokens: int
    seconds: float
    peak_memory_bytes: int


class RunDirectory:
    """The directory of a run, which locks, records and finishes it. Only the first rank calls `start` and `finish`."""

    def __init__(self, settings: Settings):
        self.path = Path(settings.run.out)
        self._settings = settings
        self._config = settings.by_flag
        self._inputs: Mapping[str, str] = {}  # name -> hash of the base, the adapter and the template
        self._trackers: list[Tracker] = []
        self._at_close = ExitStack()

    def open(self, base: Base) -> RunHistory:
        """Lock the directory for this run of a base, and return what its earlier starts left."""
        self._inputs = _hash_inputs(base, self._settings.data.prompt_style)
        if different := processes.differing_keys(self._inputs):
            raise TrainingError(f"the processes of the run have different files: {', '.join(different[:5])}")
        return processes.run_on_rank0(self._open)

    def _open(self) -> RunHistory:
        path = self.path / "run.json"
        if holds_files(self.path) and not path.is_file():
            raise TrainingError(f"{self.path}: holds files, but no run; give another --out")
        self._at_close.enter_context(locked(self.path))
        if not path.is_file():
            return RunHistory(self._settings.run.dtype)
        checkpoint, damaged = checkpoints.newest_checkpoint(self.path / "checkpoints")
        record = read_run_record(path)
        before, config = record["config"], self._config
        is_finished = (self.path / "summary.json").is_file()
        if self._settings.run.resume == "never":
            raise TrainingError(f"{self.path}: has a run, and --resume is never; use another directory")
        theirs = record.get("versions", {}).get("minilora", "0")
        ours = importlib.metadata.version("minilora")
        if not is_finished and theirs.split(".")[:2] != ours.split(".")[:2]:
            raise TrainingError(
                f"{self.path}: minilora {ours} does not resume a run of {theirs}; use another directory"
            )
        may_change = checkpoints.BOOKKEEPING | {*MAY_CHANGE, *HASHED}
        if all(str(style).endswith(".jinja") for style in (before.get("prompt_style"), config["prompt_style"])):
            may_change.add("prompt_style")
        if different := [key for key in config if key not in may_change and before.get(key) != config[key]]:
            changes = ", ".join(f"{key} was {before.get(key)!r} and is {config[key]!r}" for key in different)
            kind = "a finished run" if is_finished else "a run"
            advice = "use another directory, or the old settings, which are in run.json"
            raise TrainingError(f"{self.path}: holds {kind} with other settings ({changes}); {advice}")
        inputs = f"{self.path}: files of the base, the adapter or the template"
        check_same(inputs, record["inputs_sha256"], self._inputs)
        first = record["starts"][0]
        return RunHistory(
            first["dtype"] if self._settings.run.dtype == "auto" else self._settings.run.dtype,
            datetime.fromisoformat(first["time"]),
            tuple(record["starts"]),
            record["data_sha256"],
            checkpoints.step_of(checkpoint),
            damaged,
            is_finished,
        )

    def start(self, run: Run, model: Llama) -> None:
        """Record this start in run.json, and open what `log` writes to."""
        weight = model.model.embed_tokens.weight
        start = {
            "time": (datetime.now(UTC).replace(microsecond=0) if run.history.starts else run.history.began).isoformat(),
            "step": run.history.step,
            "device": str(weight.device),
            "dtype": str(weight.dtype).removeprefix("torch."),
            "gradient_checkpointing": run.plan.training.gradient_checkpointing,
            "threads": torch.get_num_threads(),
            "plain": is_plain(),
            "ranks": run.plan.ranks,
            "shard": run.plan.shard,
        }
        versions = {name: importlib.metadata.version(name) for name in PACKAGES}
        record = {
            "config": self._config,
            "versions": {**versions, "python": platform.python_version()},
            "data_sha256": run.data.files,
            "inputs_sha256": self._inputs,
            "starts": [*run.history.starts, start],
        }
        with replacing(self.path / "run.json") as temporary:
            write_json(temporary, record)
        rows = run.data.train
        system = self._settings.data.system if rows.system is None else rows.system
        prompts = Prompts("template" if rows.conversations else "plain", system, rows.thinking)
        run.data.tokenizer.with_prompts(prompts).save(self.path, PROMPT_FILES)
        self._trackers = [Tracker("jsonl", self.path)]
        if self._settings.run.report != "none":
            self._trackers.append(Tracker(self._settings.run.report, self.path, self._config))
            self._at_close.callback(self._trackers[-1].close)

    def log(self, record: Record) -> None:
        """Write a record to metrics.jsonl and to `--report`, unless `--logging-steps` leaves it out."""
        if "eval_loss" in record or record["step"] % self._settings.training.logging_steps == 0:
            for tracker in self._trackers:  # which only the first rank has
                tracker(record)

    def finish(
        self, model: Llama, tokenizer: Tokenizer, summary: RunSummary, answers: Sequence[Mapping[str, Any]]
    ) -> None:
        """Save adapter, tokenizer, held-out rows with some answers, and the summary, which marks the run finished."""
        with publishing(self.path) as directory:
            save_adapter_files(model, directory)
            tokenizer.save(directory)
            copy_prompt_files([self.path], directory)
            if answers:
                lines = (f"{json.dumps(row, ensure_ascii=False)}\n" for row in answers)
                (directory / "held_out.jsonl").write_text("".join(lines), encoding="utf-8")
            write_json(directory / "summary.json", without_nan(asdict(summary)))
            write_cards(directory, self._settings.run.model)

    def close(self) -> None:
        """Close the files that are open, so that another process may use the directory; leave no empty one."""
        self._at_close.close()


def read_run_record(path: Path) -> dict[str, Any]:
    """Read a run.json; raise a FormatError if it lacks what resuming the run needs."""
    record = read_json(path)
    try:
        first = record["starts"][0]
        datetime.fromisoformat(first["time"]).astimezone()
        is_whole = isinstance(first["dtype"], str)
        is_whole &= all(isinstance(record[key], dict) for key in ("config", "data_sha256", "inputs_sha256"))
    except (KeyError, IndexError, TypeError, ValueError, OverflowError):
        is_whole = False
    if not is_whole:
        need = "config, starts (with time and dtype), data_sha256 and inputs_sha256"
        raise FormatError(f"{path}: is not the run.json of a run: it lacks one of {need}; use another directory")
    return record


def _hash_inputs(base: Base, prompt_style: str) -> dict[str, str]:
    """Return hashes of the files that a run starts from, except its data: base, tokenizer, adapter and template."""
    paths = {f"model/{path.name}": path for path in sorted(base.location.path.glob("*.safetensors"))}
    paths |= {f"model/{name}": base.location.path / name for name in ("config.json", *TOKENIZER_FILES)}
    for adapter in base.adapters:
        paths |= {f"adapter/{name}": adapter / name for name in (CONFIG_FILE, WEIGHTS_FILE, *TOKENIZER_FILES)}
    if prompt_style.endswith(".jinja"):
        paths["prompt_style"] = Path(prompt_style)
    return {name: hash_of(path) for name, path in paths.items() if path.is_file()}


def hash_of(path: Path) -> str:
    """Return the SHA-256 of a file; of a large one, that of its size and of evenly spread parts."""
    size = path.stat().st_size
    if size <= WHOLE:
        return sha256_of(path)
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for i in range(PIECES):
            file.seek(i * (size - PIECE) // (PIECES - 1))
            digest.update(file.read(PIECE))
    return digest.hexdigest()


def without_nan(value: Any) -> Any:
    """Return a JSON value with null for each number that is not finite: JSON has no such numbers."""
    return json.loads(json.dumps(value), parse_constant=lambda name: None)


def check_same(what: str, before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Raise a `TrainingError` that names the files whose hashes are not those of the run's first start."""
    if changed := sorted(name for name in before.keys() | now if before.get(name) != now.get(name)):
        raise TrainingError(f"{what} changed since the run began: {', '.join(changed[:5])}; use another directory")
