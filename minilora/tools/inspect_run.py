"""What a run's directory tells of how it went."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minilora.runs.checkpoints import checkpoints
from minilora.runs.metrics import read_records
from minilora.runs.settings import default_settings
from minilora.storage import read_json


def run_facts(directory: Path) -> dict[str, Any]:
    """run.json as it is, summary.json if the run has finished, and the newest step, evaluation and checkpoint.

    "settings" are what of the configuration differs from the defaults.

    Raises:
        FormatError: a file is damaged.
    """
    record = read_json(directory / "run.json")
    defaults = default_settings()
    settings = record.get("config")
    if isinstance(settings, dict):
        settings = {key: value for key, value in settings.items() if key not in defaults or defaults[key] != value}
    facts = {"path": str(directory), "settings": settings, **record}
    metrics, summary = directory / "metrics.jsonl", directory / "summary.json"
    for line in read_records(metrics) if metrics.is_file() else []:
        facts["evaluation" if "eval_loss" in line else "last_step"] = line
    facts["checkpoint"] = next((path.name for path in reversed(checkpoints(directory / "checkpoints"))), None)
    facts["summary"] = read_json(summary) if summary.is_file() else None
    return facts
