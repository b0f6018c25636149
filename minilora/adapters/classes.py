"""What the adapter of a classifier gives classes to, and which: its own files say it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from minilora.adapters.layout import CONFIG_FILE, PREFIX, WEIGHTS_FILE, metadata_of
from minilora.errors import FormatError
from minilora.models.hub import fetch
from minilora.storage import TensorFile, read_json

if TYPE_CHECKING:
    from minilora.models.config import Unit

UNITS: dict[str | None, Unit] = {"SEQ_CLS": "sequence", "TOKEN_CLS": "token"}  # task_type -> what gets a class
LABELS = "labels"  # in the metadata of the weights' file


def classes_of(path: str | Path) -> tuple[Unit | None, tuple[str, ...]]:
    """What gets a class, and the classes; None and () for an adapter of another task.

    Those of PEFT do not name the classes: they are LABEL_0, LABEL_1, … then, as transformers calls them.

    Raises:
        FormatError: there is no such adapter, it has no head of a classifier, or names its classes badly.
    """
    directory = fetch(path, "adapter")
    task = read_json(directory / CONFIG_FILE).get("task_type")
    unit = UNITS.get(task) if isinstance(task, str) else None
    return unit, _labels(TensorFile(directory / WEIGHTS_FILE)) if unit else ()


def labels_in_metadata(labels: object) -> dict[str, str]:
    """The entry of the metadata; none if they are no names of classes."""
    return {LABELS: json.dumps(labels)} if _are_names(labels) else {}


def _labels(file: TensorFile) -> tuple[str, ...]:
    head = f"{PREFIX}score.weight"
    if head not in file.shapes:
        raise FormatError(f"{file.path}: there is no {head}, the head of a classifier")
    if labels := metadata_of(file, LABELS, lambda told: tuple(told) if _are_names(told) else None, "names of classes"):
        return labels
    return tuple(f"LABEL_{i}" for i in range(file.shapes[head][0]))


def _are_names(labels: object) -> bool:
    return isinstance(labels, list | tuple) and len(labels) > 1 and all(isinstance(label, str) for label in labels)
