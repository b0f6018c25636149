"""What a run's directory and its checkpoints tell of how it went."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from minilora.errors import FormatError
from minilora.lora.config import LoraConfig
from minilora.metrics import read_records
from minilora.run import RunConfig, resolve
from minilora.storage import read_json
from minilora.train.config import DataConfig, TrainConfig
from minilora.train.state import checkpoints

T = TypeVar("T")


@dataclass(frozen=True)
class RunFacts:
    """A run; `settings` are those that differ from the defaults, `summary` is there when the run has finished.

    `last_step` and `last_evaluation` are the newest lines of their kind in metrics.jsonl.
    """

    path: str
    settings: dict[str, Any]
    versions: dict[str, str]
    data_sha256: dict[str, str]
    starts: list[dict[str, Any]]
    summary: dict[str, Any] | None
    last_step: dict[str, Any] | None
    last_evaluation: dict[str, Any] | None
    checkpoints: list[str]


@dataclass(frozen=True)
class CheckpointFacts:
    """A checkpoint of a run: how far it was."""

    path: str
    state: dict[str, Any]


def run_facts(directory: Path) -> RunFacts:
    """What the directory of a run holds, besides the adapter.

    Raises:
        FormatError: a file is damaged.
    """
    path = directory / "run.json"
    record = read_json(path)
    settings, defaults = _part(path, record, "config", dict), _defaults()
    summary, metrics = directory / "summary.json", directory / "metrics.jsonl"
    records = read_records(metrics) if metrics.is_file() else []
    return RunFacts(
        path=str(directory),
        settings={key: value for key, value in settings.items() if key not in defaults or defaults[key] != value},
        versions=_part(path, record, "versions", dict),
        data_sha256=_part(path, record, "data_sha256", dict),
        starts=_part(path, record, "starts", list),
        summary=read_json(summary) if summary.is_file() else None,
        last_step=next((line for line in reversed(records) if "loss" in line), None),
        last_evaluation=next((line for line in reversed(records) if "eval_loss" in line), None),
        checkpoints=[found.name for found in checkpoints(directory / "checkpoints")],
    )


def _defaults() -> dict[str, Any]:
    """What run.json has for a run without flags."""
    return json.loads(json.dumps(resolve(RunConfig(), LoraConfig(), DataConfig(), TrainConfig())))


def checkpoint_facts(directory: Path) -> CheckpointFacts:
    """What a checkpoint holds, besides the adapter and the optimizer's tensors."""
    return CheckpointFacts(str(directory), read_json(directory / "state.json"))


def _part(path: Path, record: dict[str, Any], key: str, kind: type[T]) -> T:
    value = record.get(key, kind())
    if not isinstance(value, kind):
        raise FormatError(f"{path}: key {key!r}: found {value!r}, need a JSON {'object' if kind is dict else 'list'}")
    return value
