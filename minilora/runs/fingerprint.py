"""One number for everything that decides what a run computes, but for the model and the code of a given loss."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minilora.adapters.config import LoraConfig
from minilora.data import Example
from minilora.runs.config import TrainConfig

LATER = (("sort_window", 1), ("compile", False))  # settings that earlier versions did not have, as they were


def bookkeeping(config: TrainConfig) -> set[str]:
    """The settings that have no effect on the result: they may change between two starts of a run."""
    names = {"save_steps", "save_total_limit", "logging_steps", "recompute"}
    return names | (set() if config.selects else {"eval_steps"})


def fingerprint(
    dataset: Sequence[Any], held_out: Sequence[Any], config: TrainConfig, adapters: Mapping[str, LoraConfig]
) -> str:
    """Settings, the adapters that are trained, and the rows. Of rows that are no `Example`, see `_plain`."""
    idle, told = bookkeeping(config) - {"recompute"}, {**asdict(config), "recompute": "none"}
    settings = {key: value for key, value in told.items() if key not in idle and (key, value) not in LATER}
    digest = hashlib.sha256(json.dumps([settings, adapters, len(dataset)], default=_plain).encode())
    for rows in (dataset, held_out):
        for i in range(len(rows)):
            digest.update(json.dumps(rows[i], default=_plain).encode())
    return digest.hexdigest()


def _plain(value: Any) -> Any:
    """What JSON has no word for: of an array its numbers, of a record its fields, of anything else its type alone."""
    if isinstance(value, Example):
        return [value.tokens, value.labels, value.shift]  # and not where they came from
    if isinstance(value, Tensor):
        numbers = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return [str(value.dtype), list(value.shape), hashlib.sha256(numbers.tobytes()).hexdigest()]
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    return type(value).__qualname__
