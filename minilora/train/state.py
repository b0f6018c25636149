"""Checkpoints from which a run goes on to the same bytes.

    checkpoints/step-000120/adapter_config.json, adapter_model.safetensors   the adapter, usable as it is
                            optimizer.safetensors                            AdamW's moments, by parameter name
                            best.safetensors                                 with `keep best`: the best adapter so far
                            state.json                                       the step, and counts so far

The order of rows and the dropout masks follow from the seed and the step, so no random state has to be kept. A
directory appears whole or not at all.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilora.errors import FormatError, TrainingError
from minilora.lora.attach import adapter_layers
from minilora.lora.files import read_factors, save_adapter
from minilora.storage import TensorFile, read_json, remove, replacing, write_json, write_tensors

MOMENTS = ("exp_avg", "exp_avg_sq", "step")


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
        save_adapter(model, directory, trained_adapter(model))
        names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
        moments = {
            f"{names[parameter]}/{key}": value
            for parameter, values in optimizer.state.items()
            for key, value in values.items()
        }
        write_tensors(directory / "optimizer.safetensors", moments)
        if best:
            write_tensors(directory / "best.safetensors", best)
        write_json(directory / "state.json", state)
    for old in checkpoints(folder)[:-keep]:
        remove(old)


def load_checkpoint(
    directory: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Put the adapter's and the optimizer's tensors back where they were; return the state, and the best adapter.

    Raises:
        FormatError: the checkpoint is not of this model and adapter.
    """
    name = trained_adapter(model)
    layers = {path: layer for path, layer in adapter_layers(model).items() if name in layer.configs}
    factors = read_factors(directory)
    if factors.keys() != layers.keys():
        raise FormatError(
            f"{directory}: the checkpoint adapts other modules: {sorted(factors.keys() ^ layers.keys())[:5]}"
        )
    with torch.no_grad():
        for path, (lora_A, lora_B) in factors.items():
            _copy(directory, layers[path].lora_A[name], lora_A)
            _copy(directory, layers[path].lora_B[name], lora_B)
    moments = TensorFile(directory / "optimizer.safetensors")
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            optimizer.state[parameter] = {}
            for key in MOMENTS:
                moment = moments.read(f"{parameter_name}/{key}").to(parameter.device, copy=True)
                if not moment.is_floating_point() or moment.shape != (() if key == "step" else parameter.shape):
                    raise FormatError(f"{moments.path}: {parameter_name}/{key} is {moment.dtype} {tuple(moment.shape)}")
                optimizer.state[parameter][key] = moment
    return read_json(directory / "state.json"), _best(directory / "best.safetensors", model)


def _best(path: Path, model: nn.Module) -> dict[str, Tensor]:
    if not path.is_file():
        return {}
    file = TensorFile(path)
    expected = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    if file.shapes != expected:
        raise FormatError(f"{path}: holds other tensors than the run trains")
    return {name: file.read(name).clone() for name in expected}


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted((path for path in found if re.fullmatch(r"step-\d{6,}", path.name)), key=_step)


def newest_step(folder: Path) -> int:
    """The step that a run goes on from: that of the newest checkpoint, or 0."""
    found = checkpoints(folder)
    return _step(found[-1]) if found else 0


def trained_adapter(model: nn.Module) -> str:
    """The name of the adapter that is being trained.

    Raises:
        TrainingError: there is none, or more than one, or it does not act.
    """
    layers = adapter_layers(model).values()
    names = {name for layer in layers for name, factor in layer.lora_A.items() if factor.requires_grad}
    if len(names) != 1:
        raise TrainingError(f"one adapter must be trainable, found {sorted(names)}: attach one first")
    name = names.pop()
    own = {id(factor[name]) for layer in layers for factor in (layer.lora_A, layer.lora_B) if name in factor}
    if others := [where for where, p in model.named_parameters() if p.requires_grad and id(p) not in own]:
        raise TrainingError(f"only the adapter can be trained, but {others[:3]} require gradients too")
    if not any(name in layer.active for layer in layers):
        raise TrainingError(f"adapter {name!r} is trainable but not active: make it act with set_adapter")
    return name


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _copy(directory: Path, parameter: Tensor, saved: Tensor) -> None:
    if parameter.shape != saved.shape:
        raise FormatError(f"{directory}: found a factor {tuple(saved.shape)}, the run has {tuple(parameter.shape)}")
    parameter.copy_(saved)
