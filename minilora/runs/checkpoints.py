"""Checkpoints from which a run goes on to the same bytes.

    checkpoints/step-000120/trained.safetensors      what training changes, by its names in the model
                            optimizer.safetensors    AdamW's moments, by parameter name
                            best.safetensors         with `keep best`: the best of what training changes, so far
                            state.json               the step, and counts so far
                            adapter_config.json, adapter_model.safetensors
                                                     if one adapter is trained: the same, usable as it is

The order of rows and the dropout masks follow from the seed and the step, so no random state has to be kept. A
directory appears whole or not at all. A run goes on from one only if its `fingerprint` is the same.
`Selection` says which weights are the result, the last or the best, and when to stop looking.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minilora.adapter import adapter_layers
from minilora.adapters.config import LoraConfig
from minilora.adapters.files import save_adapter
from minilora.data import Example
from minilora.errors import FormatError, TrainingError
from minilora.runs.config import TrainConfig
from minilora.runs.objective import trained_parameters
from minilora.storage import TensorFile, read_json, remove, replacing, write_json, write_tensors


class Selection:
    """The evaluations of a run so far.

    Attributes:
        best_step, best_loss: of the lowest loss; 0 and None before the first evaluation.
        stale: evaluations since then.
        tensors: what training had made of the model then (see `changing`); empty with `keep="last"`.
    """

    def __init__(self, config: TrainConfig):
        self.config = config
        self.best_step, self.stale = 0, 0
        self.best_loss: float | None = None
        self.tensors: dict[str, Tensor] = {}

    @property
    def has_ended(self) -> bool:
        """Has the loss not fallen for `early_stopping` evaluations?"""
        return self.config.early_stopping is not None and self.stale >= self.config.early_stopping

    def note(self, model: nn.Module, step: int, loss: float) -> None:
        """Take in an evaluation. A loss that is not finite is never the best."""
        if loss < (float("inf") if self.best_loss is None else self.best_loss):
            self.best_step, self.best_loss, self.stale = step, loss, 0
            if self.config.keep == "best":
                self.tensors = {name: tensor.detach().clone() for name, tensor in changing(model).items()}
        else:
            self.stale += 1

    def restore(self, model: nn.Module) -> None:
        """Put the best weights into the model, if they are wanted."""
        _put(model, self.tensors)

    def state(self) -> dict[str, Any]:
        """What a checkpoint says of it, beside the tensors."""
        return {"best_step": self.best_step, "best_loss": self.best_loss, "stale": self.stale}

    def resume(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Go on from a checkpoint.

        Raises:
            FormatError: it lacks something.
        """
        self.best_step, self.best_loss, self.stale = state["best_step"], state["best_loss"], state["stale"]
        self.tensors = tensors
        if self.config.keep == "best" and self.best_step and not tensors:
            raise FormatError(f"the checkpoint lacks best.safetensors, the weights of step {self.best_step}")


LATER = (("sort_window", 1), ("compile", False))  # settings that earlier versions did not have, as they were
MOMENTS = ("exp_avg", "exp_avg_sq")
STATE: dict[str, Any] = {  # of state.json, what each number may be
    "step": int,
    "tokens": int,
    "seconds": int | float,
    "best_step": int,
    "best_loss": int | float | None,
    "stale": int,
}


def changing(model: nn.Module) -> dict[str, Tensor]:
    """Name -> what training changes: parameters that require grad; and the buffers that belong to the model's state.

    Those are, say, the averages of a batch norm. Where an adapter's start is kept (PiSSA), it is one of them: computed
    anew, it might differ in a bit.
    """
    lasting = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in lasting}
    return {name: p for name, p in model.named_parameters() if p.requires_grad} | buffers


@torch.no_grad()
def _put(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors, by their names in `changing`, into the model."""
    now = changing(model)
    for name, tensor in tensors.items():
        now[name].copy_(tensor)


def trained_adapters(model: nn.Module) -> dict[str, LoraConfig]:
    """Name -> config of the adapters of which something requires grad.

    Raises:
        TrainingError: nothing of the model requires grad, or an adapter does that does not act.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise TrainingError("nothing of the model is trainable: attach an adapter, or let parameters require grad")
    found: dict[str, LoraConfig] = {}
    active: set[str] = set()
    for layer in adapter_layers(model).values():
        active |= set(layer.active)
        for name, config in layer.configs.items():
            if any(parameter.requires_grad for parameter in layer.own_parameters(name)):
                found.setdefault(name, config)
    if idle := sorted(found.keys() - active):
        raise TrainingError(f"adapter {idle[0]!r} is trainable but not active: make it act with set_adapter")
    return found


def save_checkpoint(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    best: dict[str, Tensor],
    keep: int,
) -> None:
    """Write `step-…` for `state["step"]`, then remove all but the newest `keep`."""
    with replacing(folder / f"step-{state['step']:06d}") as directory:
        adapters = trained_adapters(model)
        if len(adapters) == 1:
            save_adapter(model, directory, next(iter(adapters)))
        write_tensors(directory / "trained.safetensors", changing(model))
        write_tensors(directory / "optimizer.safetensors", _moments(optimizer))
        if best:
            write_tensors(directory / "best.safetensors", best)
        write_json(directory / "state.json", state)
    for old in checkpoints(folder)[:-keep]:
        remove(old)


def load_checkpoint(
    directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Put what was trained and the optimizer's tensors back where they were; return the state, and the best weights.

    Raises:
        FormatError: the checkpoint is not of this model and what it trains.
    """
    now = changing(model)
    trained = _tensors(directory / "trained.safetensors", now)
    best = directory / "best.safetensors"
    kept = {name: tensor.clone() for name, tensor in _tensors(best, now).items()} if best.is_file() else {}
    file = TensorFile(directory / "optimizer.safetensors")
    _restore(file, optimizer)
    _put(model, trained)
    return _read_state(directory / "state.json"), kept


def _read_state(path: Path) -> dict[str, Any]:
    state = read_json(path)
    if bad := [key for key, kind in STATE.items() if key not in state or not isinstance(state[key], kind)]:
        found = f"is {state[bad[0]]!r}" if bad[0] in state else "is not there"
        raise FormatError(f"{path}: {bad[0]} {found}")
    return state


def _tensors(path: Path, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file, which are those that are expected.

    Raises:
        FormatError: they are not.
    """
    file = TensorFile(path)
    shapes = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    if file.shapes != shapes:
        differing = {name for name in file.shapes.keys() | shapes if file.shapes.get(name) != shapes.get(name)}
        raise FormatError(f"{path}: holds other tensors than the run trains: {sorted(differing)[:5]}")
    found = {name: file.read(name) for name in expected}
    if other := [name for name in expected if found[name].dtype != expected[name].dtype]:
        raise FormatError(f"{path}: {other[0]} is {found[other[0]].dtype}, the run has {expected[other[0]].dtype}")
    return found


def _moments(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return AdamW's tensors as "name/key"; a parameter that has made no step has none."""
    return {
        f"{name}/{key}": tensor
        for name, parameter in trained_parameters(optimizer).items()
        for key, tensor in optimizer.state[parameter].items()
    }


def _restore(file: TensorFile, optimizer: torch.optim.Optimizer) -> None:
    """Put AdamW's tensors back.

    Raises:
        FormatError: one is missing or does not fit.
    """
    for name, parameter in trained_parameters(optimizer).items():
        if any(f"{name}/{key}" in file.shapes for key in (*MOMENTS, "step")):
            step = _fitting(file, f"{name}/step", torch.tensor(0.0, dtype=torch.float32)).to(parameter.device)
            moments = {key: _fitting(file, f"{name}/{key}", parameter).to(parameter.device) for key in MOMENTS}
            optimizer.state[parameter] = {"step": step.clone(), **{k: t.clone() for k, t in moments.items()}}


def _fitting(file: TensorFile, name: str, like: Tensor) -> Tensor:
    """A tensor of the file.

    Raises:
        FormatError: it is lacking, or has another dtype or shape.
    """
    found = file.read(name)
    if (found.dtype, found.shape) != (like.dtype, like.shape):
        raise FormatError(f"{file.path}: {name} is {found.dtype} {tuple(found.shape)}")
    return found


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted((path for path in found if re.fullmatch(r"step-\d{6,}", path.name)), key=_step)


def newest_step(folder: Path) -> int:
    """The step that a run goes on from: that of the newest checkpoint, or 0."""
    found = checkpoints(folder)
    return _step(found[-1]) if found else 0


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def bookkeeping(config: TrainConfig) -> set[str]:
    """The settings that have no effect on the result: they may change between two starts of a run."""
    names = {"save_steps", "save_total_limit", "logging_steps", "recompute"}
    return names | (set() if config.selects else {"eval_steps"})


def fingerprint(
    dataset: Sequence[Any], held_out: Sequence[Any], config: TrainConfig, adapters: Mapping[str, LoraConfig]
) -> str:
    """Return a hash of the settings, the adapters that are trained, and the rows; see `_plain` for rows of others."""
    idle, values = bookkeeping(config) - {"recompute"}, {**asdict(config), "recompute": "none"}
    settings = {key: value for key, value in values.items() if key not in idle and (key, value) not in LATER}
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
