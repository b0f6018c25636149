"""How much memory a run takes, and what would help where that is more than there is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, get_args

import torch

from minilora.adapters.attach import attach
from minilora.errors import TrainingError
from minilora.models.checkpoint import resolve_dtype
from minilora.models.recompute import Recompute
from minilora.runs.data import Example
from minilora.runs.diagnose import free_memory_bytes
from minilora.runs.inputs import Data
from minilora.runs.memory import Forecast, amount, fitting, forecast, largest, largest_evaluation

if TYPE_CHECKING:
    from minilora.runs.run import Run

REMEDIES = 3  # that are named when a run does not fit


def memory_of(run: Run, data: Data, device: torch.device, **changes: Any) -> Forecast:
    """What the micro-batch with the most tokens takes, and the largest evaluation, with some settings changed."""
    training = replace(run.training, **{key: changes[key] for key in changes if key in vars(run.training)})
    quantization = replace(run.quantization, quantize=changes.get("quantize", run.quantization.quantize))
    is_full = changes.get("method", run.config.method) == "full"
    dtype = "float32" if is_full else changes.get("dtype", run.config.dtype)
    dtype = resolve_dtype(dtype, run.base_config().source, device)
    model = run.base_for(data, dtype, "meta", quantization)
    if not is_full:
        attach(model, run.lora_for(data))

    def lengths(examples: Sequence[Example]) -> list[int]:
        return [min(len(example.tokens), changes.get("max_length", len(example.tokens))) for example in examples]

    labelled = [example.labelled for example in data.train]
    rows = largest(lengths(data.train), labelled, training)
    evaluated = largest_evaluation(*map(lengths, (data.valid, data.test, data.general)))
    return forecast(model, *rows, training, device, evaluated)


def choose_recompute(run: Run, data: Data, device: torch.device) -> tuple[Recompute, Forecast]:
    """How the run recomputes, with `auto` the fastest way that fits; and what the run takes then."""
    wanted = run.training.recompute
    ways = get_args(Recompute) if wanted == "auto" else (wanted,)
    return fitting(lambda way: memory_of(run, data, device, recompute=way), free_memory_bytes(device), ways)


def check_memory(run: Run, data: Data, device: torch.device, told: Forecast) -> None:
    """Refuse a run that cannot fit, as was `told` of it, and say what would help, the cheapest first.

    Raises:
        TrainingError: it takes more memory than is free.
    """
    free, needed = free_memory_bytes(device), told.peak
    if free is None or needed <= free:
        return
    lines = [f"the run needs {amount(needed)} of memory, and {amount(free)} are free on {device}"]
    for flags, changes, cost in _remedies(run, data):
        if len(lines) <= REMEDIES and (peak := memory_of(run, data, device, **changes).peak) < needed:
            lines.append(f"{flags} brings it to {amount(peak)}; {cost}")
    raise TrainingError("\n  ".join([*lines, "--force runs all the same"]))


def _remedies(run: Run, data: Data) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Flags that may save memory, what they change, and what they cost: the cheapest first."""
    training, more = run.training, 2 * run.training.gradient_accumulation_steps
    if training.batch_tokens is None:
        name, fewer = "batch_size", (min(training.batch_size, len(data.train)) + 1) // 2
    else:
        name, fewer = "batch_tokens", (training.batch_tokens + 1) // 2
    flags = f"--{name.replace('_', '-')} {fewer} --gradient-accumulation-steps {more}"
    yield flags, {name: fewer, "gradient_accumulation_steps": more}, "the gradient is the same"
    if training.recompute != "block":
        yield "--recompute block", {"recompute": "block"}, "slower, the result is the same"
    if run.is_full:
        yield "--method lora", {"method": "lora"}, "an adapter is trained, and the weights stay as they are"
    elif run.quantization.quantize == "none" and not run.base_config().source.get("quantization_config"):
        yield "--quantize nf4", {"quantize": "nf4"}, "a little slower, and the base is rounded"
    if not run.is_full:
        yield "--dtype bfloat16", {"dtype": "bfloat16"}, "the base and the computation are rounded"
    half = (max(len(example.tokens) for example in data.train) + 1) // 2
    yield f"--max-length {half}", {"max_length": half}, "longer rows lose what they end in"
