"""Checkpoints from which a run continues to the same bytes.

    checkpoints/step-000120/trained.safetensors      what training changes, by its names in the model
                            optimizer.safetensors    the optimizer's state, such as AdamW's moments, by parameter
                            best.safetensors         with `keep best`: the same of the best evaluation so far
                            state.json               the step, and counts so far
                            adapter_config.json, adapter_model.safetensors
                                                     if one adapter is trained, which `ml.attach` or
                                                     `ml.load_adapter` made: that adapter in PEFT's layout
                            chat_template.jinja, minilora-prompts.json
                                                     with it: those of the run's directory
                            minilora-manifest.json   sizes and hashes of all these

The order of rows and the dropout masks follow from the seed and the step, so no random state is saved. A directory
appears whole or not at all. A run resumes from the newest one that matches its manifest, and only if its
`fingerprint` and the start of what is trained are the same.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.optim import Optimizer

from minilora import files
from minilora.adapter import adapter_layers, own_parameters
from minilora.adapters.config import LoraConfig
from minilora.adapters.files import save_adapter_files
from minilora.data import Example
from minilora.errors import DataError, FormatError, TrainingError
from minilora.lora import LoraAdapter
from minilora.models.fsdp import whole
from minilora.models.prompts import PROMPTS_FILE, copy_prompt_files
from minilora.options import fits
from minilora.runs.sampler import kept_random_state
from minilora.runs.settings import TrainConfig

# Settings that may change between two starts of a run, since its weights do not depend on them.
BOOKKEEPING = {"save_steps", "save_total_limit", "logging_steps", "gradient_checkpointing"}
ROUNDED = (".absmax", ".scales", ".offset")  # parts of a 4-bit weight that another number of threads rounds differently


@dataclass
class State:
    """The progress of a run, as in state.json."""

    run: Mapping[str, Any] = field(default_factory=dict)  # its `fingerprint`, and how many `steps` it has
    start: tuple[float, ...] = ()  # `start_numbers` of what is trained
    step: int = 0  # steps that are done
    tokens: int = 0  # seen in them
    seconds: float = 0.0  # spent on them
    best_step: int = 0  # of the evaluation with the lowest loss; 0 before the first one
    best_loss: float | None = None

    def record_evaluation(self, loss: float) -> bool:
        """Record the loss of an evaluation; return whether it is the lowest. One that is not finite never is."""
        is_lowest = loss < (math.inf if self.best_loss is None else self.best_loss)
        if is_lowest:
            self.best_step = self.step
            self.best_loss = loss
        return is_lowest


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return what training changes, by name: parameters that require grad, and buffers that belong to the state.

    Such buffers are, for instance, the averages of a batch norm, and the kept start of an adapter (PiSSA): computed
    again, it might differ in a bit.
    """
    state = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in state}
    return {name: p for name, p in model.named_parameters() if p.requires_grad} | buffers


@torch.no_grad()
def restore(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors into the model's `trained_tensors` of the same names."""
    own = trained_tensors(model)
    for name, tensor in tensors.items():
        own[name].copy_(tensor)


def trained_adapters(model: nn.Module) -> dict[str, list[Any]]:
    """Return what the adapters that have trainable parameters were made from, by name; each has to be active.

    For each layer it is the `LoraConfig` or, where there was none, what the adapter has instead.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise TrainingError("nothing of the model is trainable: attach an adapter, or let parameters require grad")
    origins: dict[str, list[Any]] = {}
    active: set[str] = set()
    for layer in adapter_layers(model).values():
        active |= set(layer.active)
        for name, adapter in layer.adapters.items():
            if any(parameter.requires_grad for parameter in own_parameters(layer, name)):
                settings = [adapter.scale, adapter.dropout.p] if isinstance(adapter, LoraAdapter) else None
                origins.setdefault(name, []).append(getattr(adapter, "lora_config", settings))
    if idle := sorted(origins.keys() - active):
        raise TrainingError(f"adapter {idle[0]!r} is trainable but not active: activate it with set_adapter")
    return origins


def state_entries(optimizer: Optimizer, model: nn.Module) -> dict[str, tuple[dict[str, Any], str]]:
    """Return the places of the values in the optimizer's state: {"parameter/key": (state of the parameter, key)}."""
    named = model.named_parameters()
    return {f"{name}/{key}": (optimizer.state[p], key) for name, p in named for key in optimizer.state.get(p, ())}


def init_optimizer_state(optimizer: Optimizer, model: nn.Module) -> None:
    """Let the optimizer create its state by a step with gradients of 1; leave the model as it was."""

    def other_attributes() -> dict[str, str]:
        attributes = {key: repr(value) for key, value in vars(optimizer).items() if key[0] != "_" and key != "state"}
        return attributes | {"param_groups": repr(optimizer)}  # the text of an optimizer shows its groups

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weights = {name: tensor.detach().to("cpu", copy=True) for name, tensor in trained_tensors(model).items()}
    before = other_attributes()
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    with kept_random_state(parameters[0].device):
        optimizer.step()
    restore(model, weights)
    optimizer.zero_grad()
    entries = state_entries(optimizer, model)
    bad = [name for name, (values, key) in entries.items() if not isinstance(values[key], int | float | Tensor)]
    bad += [f"state[{key!r:.40}]" for key in optimizer.state.keys() - {*parameters}]
    bad += [f"the attribute {name!r}" for name, text in other_attributes().items() if before.get(name) != text]
    if bad:
        raise TrainingError(
            f"{type(optimizer).__name__} keeps {bad[0]}, which checkpoints do not store: they store the numbers and "
            "tensors in its `state` of each parameter"
        )


def _as_tensor(value: Any) -> Tensor:
    """Return a tensor as it is, and a number as a tensor in double precision or int64."""
    return value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))


def save_checkpoint(
    folder: Path, model: nn.Module, optimizer: Optimizer, state: State, best: dict[str, Tensor], keep: int
) -> None:
    """Write the checkpoint of a step, with the weights of the best one, then remove all but the newest `keep`.

    The metrics of the run are flushed first, so no metrics of a step before a checkpoint are lost.
    """
    files.flush(folder.parent / "metrics.jsonl")
    entries = state_entries(optimizer, model).items()
    optimizer_state = {name: _as_tensor(values[key]) for name, (values, key) in entries}
    adapters = trained_adapters(model)
    for damaged in checkpoints(folder):
        if step_of(damaged) >= state.step:  # or the run would have resumed from it
            files.remove(damaged)
    with files.replacing(folder / f"step-{state.step:06d}") as directory:
        directory.mkdir()
        if len(adapters) == 1 and all(isinstance(origin, LoraConfig) for made in adapters.values() for origin in made):
            save_adapter_files(model, directory, *adapters)
            if (folder.parent / PROMPTS_FILE).exists():  # the command's run
                copy_prompt_files([folder.parent], directory)
        files.write_tensors(directory / "trained.safetensors", trained_tensors(model))
        files.write_tensors(directory / "optimizer.safetensors", optimizer_state)
        if best:
            files.write_tensors(directory / "best.safetensors", best)
        files.write_json(directory / "state.json", asdict(state))
        files.write_json(directory / files.MANIFEST, files.manifest_of(directory))
    prune(folder, state.step, keep)


def prune(folder: Path, step: int, keep: int) -> None:
    """Remove the checkpoints up to a step except for the newest `keep` of them."""
    for old in [path for path in checkpoints(folder) if step_of(path) <= step][:-keep]:
        files.remove(old)


def read_state(directory: Path) -> State:
    """Read the state of a checkpoint."""
    path = directory / "state.json"
    values = files.read_json(path)
    hints = get_type_hints(State)
    if bad := [name for name, hint in hints.items() if name not in values or not fits(values[name], hint)]:
        raise FormatError(f"{path}: {bad[0]} " + (f"is {values[bad[0]]!r}" if bad[0] in values else "is not there"))
    state = State(**{name: values[name] for name in hints})
    if state.step != step_of(directory):
        problem = f"state.json says step {state.step}, and the name of the directory another one"
        raise FormatError(f"{directory}: {problem}; remove the directory to resume from an older checkpoint")
    return state


def load_checkpoint(
    directory: Path, model: nn.Module, optimizer: Optimizer, new: State
) -> tuple[State, dict[str, Tensor]]:
    """Restore the model and the optimizer; return the state, and the weights of the best step.

    The checkpoint has to be of a run that began in the state `new`; the model has the weights of its start, or those of
    the checkpoint. If this is not so, if a file is damaged, or has other tensors than the run trains, the model stays
    unchanged.
    """
    state = read_state(directory)
    if other := differences(state.run, new.run):
        raise TrainingError(f"{directory}: written by a run with other data or settings ({', '.join(other)})")
    own = trained_tensors(model)
    trained = _read(directory / "trained.safetensors", own)
    best: dict[str, Tensor] = {}
    if (directory / "best.safetensors").is_file():
        best = {name: tensor.clone() for name, tensor in _read(directory / "best.safetensors", own).items()}
    starts = [state.start, *(start_numbers(model, tensors) for tensors in (trained, best) if tensors)]
    if not any(np.allclose(start, new.start, rtol=1e-4, atol=1e-7) for start in starts):
        raise TrainingError(
            f"{directory}: the run that wrote it began with other values of the trained parameters, for example by "
            "another seed of `ml.attach`; pass a fresh model whose adapter is made as in the first start"
        )
    init_optimizer_state(optimizer, model)
    entries = state_entries(optimizer, model)
    expected = {name: _as_tensor(values[key]) for name, (values, key) in entries.items()}
    for name, tensor in _read(directory / "optimizer.safetensors", expected).items():
        values, key = entries[name]
        is_tensor = isinstance(values[key], Tensor)
        values[key] = tensor.to(values[key].device, copy=True) if is_tensor else tensor.item()
    restore(model, trained)
    return state, best


def _read(path: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read the tensors of a file, whose names, shapes and dtypes have to be those of the `expected` ones."""
    file = files.TensorFile(path)
    tensors = {name: file.read(name) for name in file.shapes}
    stored = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    own = {name: (tensor.shape, tensor.dtype) for name, tensor in expected.items()}
    if differing := sorted(name for name in stored | own if stored.get(name) != own.get(name)):
        raise FormatError(f"{path}: holds other tensors than the run trains: {differing[:5]}")
    return tensors


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first."""
    paths = folder.iterdir() if folder.is_dir() else ()
    return sorted((path for path in paths if re.fullmatch(r"step-\d{6,}", path.name)), key=step_of)


def newest_checkpoint(folder: Path) -> tuple[Path | None, tuple[str, ...]]:
    """Return the newest checkpoint that matches its manifest, and what is wrong with newer ones."""
    damaged: list[str] = []
    for path in reversed(checkpoints(folder)):
        try:
            files.verify(path)
            return path, tuple(damaged)
        except FormatError as error:
            damaged.append(str(error))
    return None, tuple(damaged)


def step_of(checkpoint: Path | None) -> int:
    """Return the step of a checkpoint; 0 of None."""
    return int(checkpoint.name.removeprefix("step-")) if checkpoint else 0


def fingerprint(
    model: nn.Module, dataset: Sequence[Any], held_out: Sequence[Any], config: TrainConfig, loss: Any, optimizer: str
) -> dict[str, Any]:
    """Return what makes a run this one, as JSON: settings, adapters and loss, and hashes of the rows and the base.

    Of each frozen parameter of the base, a hash covers at most 1024 evenly spaced numbers.
    """
    idle = BOOKKEEPING | {"epochs", "max_steps"}  # their effect is a number of steps, which `State` has
    run = {
        "config": {key: value for key, value in asdict(config).items() if key not in idle},
        "adapters": {
            name: made[0] if made.count(made[0]) == len(made) else made
            for name, made in trained_adapters(model).items()
        },
        "loss": describe(loss),
        "optimizer": optimizer,
    }
    frozen = [p for name, p in model.named_parameters() if not (p.requires_grad or name.endswith(ROUNDED))]
    may_be_sharded = distributed.is_available() and distributed.is_initialized()
    base = [_spread(whole(p) if may_be_sharded else p) for p in frozen]
    parts = {"dataset": dataset, "held_out": held_out, "model": base}
    return json.loads(json.dumps(run, default=_as_json)) | {name: _hash(rows) for name, rows in parts.items()}


def start_numbers(model: nn.Module, tensors: Mapping[str, Tensor]) -> tuple[float, ...]:
    """Return at most 64 evenly spaced numbers of the trained parameters of a model, whose values `tensors` has."""
    parts = [_spread(tensors[name]).cpu().double() for name, p in model.named_parameters() if p.requires_grad]
    return tuple(_spread(torch.cat(parts), 64).tolist())


def _spread(tensor: Tensor, most: int = 1024) -> Tensor:
    """Return at most so many evenly spaced numbers of a tensor."""
    return tensor.detach().reshape(-1)[:: max(1, math.ceil(tensor.numel() / most))]


def describe(value: Any) -> str:
    """Return a plain value as Python writes it, a function as its name, a `partial` as its call, else the type."""
    if isinstance(value, partial):
        named = [f"{name}={describe(each)}" for name, each in sorted(value.keywords.items())]
        return f"{describe(value.func)}({', '.join([*map(describe, value.args), *named])})"
    if isinstance(value, tuple):
        return f"({', '.join(map(describe, value))})"
    if value is None or isinstance(value, int | float | str):
        return repr(value)
    return str(getattr(value, "__qualname__", type(value).__qualname__))


def differences(before: Any, now: Any, name: str = "") -> list[str]:
    """Name what differs between two JSON values, with both values if they are short."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [key for key in now | before if before.get(key) != now.get(key)]
        return [text for key in keys for text in differences(before.get(key), now.get(key), f"{name}.{key}".strip("."))]
    change = f" was {before!r} and is {now!r}"
    return [name + change if len(change) < 99 else name]


def _hash(rows: Sequence[Any]) -> str:
    digest = hashlib.sha256(str(len(rows)).encode())
    for i in range(len(rows)):
        digest.update(json.dumps(rows[i], default=_as_json).encode())
    return digest.hexdigest()


def _as_json(value: Any) -> Any:
    """Return an array as its numbers, and a data class or a mapping as its fields."""
    if isinstance(value, Example):
        return [value.tokens, value.labels]  # and not where they came from
    if isinstance(value, Tensor):
        numbers = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        return [str(value.dtype), list(value.shape), hashlib.sha256(numbers.tobytes()).hexdigest()]
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if is_dataclass(value):
        return {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, Mapping):
        return dict(value)
    raise DataError(
        f"a row holds a {type(value).__qualname__}, whose content cannot be compared with that of another start or "
        "process of the run: give numbers, text, tensors, arrays, lists, mappings or data classes"
    )
