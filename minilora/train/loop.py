"""The training loop: what a step is, and what happens around it.

The loss of a step is the sum of the losses of its rows divided by their number; for rows of text, over their labelled
tokens. Any cutting of a step into micro-batches gives one gradient:

    L = 1/n Σ_t -log p(token t | before),  n = Σ over micro-batches of their labelled tokens

A number that is known beforehand divides each micro-batch's sum before its backward pass, another one the gradient.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minilora.errors import DataError, FormatError, TrainingError
from minilora.lora.attach import set_dropout_step
from minilora.storage import read_json
from minilora.train.batch import Rows, plan_steps
from minilora.train.config import TrainConfig
from minilora.train.diagnose import first_bad_module, peak_memory_bytes, release_memory
from minilora.train.evaluate import mean_loss
from minilora.train.fingerprint import fingerprint
from minilora.train.objective import GivenLoss, Loss, Objective, TokenLoss
from minilora.train.optimizer import adamw, learning_rate, set_rate
from minilora.train.select import Selection
from minilora.train.state import checkpoints, load_checkpoint, newest_step, save_checkpoint, trained_adapters

Record = dict[str, Any]  # one line of metrics.jsonl
OnStep = Callable[[Record], bool | None]
MICRO_BATCH_SEEDS = 1_000_003  # apart enough that no two (seed, micro-batch) of sensible size meet


@dataclass(frozen=True)
class TrainResult:
    """What a run did, earlier parts of a resumed one included.

    `finished` is false if `on_step` stopped it; `kept` is the step whose weights the model holds now.
    """

    steps: int
    total_steps: int
    tokens: int
    seconds: float
    finished: bool
    kept: int


def train(
    model: nn.Module,
    dataset: Sequence[Any],
    config: TrainConfig | None = None,
    on_step: OnStep | None = None,
    held_out: Sequence[Any] = (),
    checkpoint_dir: str | Path | None = None,
    loss: Loss | None = None,
) -> TrainResult:
    """Train what of the model requires grad: an attached adapter; or, if there is none, the model itself.

    Weights are trained in their own dtype. In bfloat16 most updates of a weight are too small to change it: train a
    whole model in float32, as adapters are.

    Args:
        model: a `Llama` or `Classifier` (a trunk `model`, a head `get_output_embeddings()`); with `loss`, any module.
        dataset: what `load_dataset` returns; with `loss`, rows of any kind.
        config: how; by default `TrainConfig()`.
        on_step: called with one record after each step and each evaluation; if it returns True the run stops there,
            with a checkpoint.
        held_out: rows to evaluate every `eval_steps` and after the last step.
        checkpoint_dir: where checkpoints go. If there is one already, the run goes on from the newest, to the same
            bytes as if it had never stopped.
        loss: (model, rows) -> (sum, count): the sum of the losses of some rows, and how many those are, such as
            labelled tokens. A step's loss is Σ sum / Σ count. `tokens` of a record are those of rows that have
            `tokens`, else the counts. By default the loss of tokens.

    Raises:
        DataError: there are no rows, an example has no label, or not one for each token, or what is counted is
            nothing; there are none to choose the best weights with; `batch_tokens` with rows without `tokens`.
        FormatError: the newest checkpoint is damaged.
        TrainingError: nothing is trainable, or an adapter that does not act; a loss, gradient or weight is not finite;
            a checkpoint belongs to another run; a model that needs `loss`.
    """
    config = config or TrainConfig()
    objective = TokenLoss(config) if loss is None else GivenLoss(loss, config)
    adapters = trained_adapters(model)
    if not len(dataset):
        raise DataError("there are no examples to learn from")
    objective.check(model, dataset)
    if config.selects and not held_out:
        raise DataError("keep best and early_stopping need held-out examples")
    lengths = objective.lengths(dataset)
    steps = plan_steps(lengths or [1] * len(dataset), config)
    optimizer = adamw(model, config)
    selection = Selection(config)
    state: Record = {"step": 0, "tokens": 0, "seconds": 0.0}
    if checkpoint_dir is not None:
        checkpoint_dir = Path(checkpoint_dir)
        state["run"] = fingerprint(dataset, held_out if config.selects else (), config, adapters)
        state = _resumed(checkpoint_dir, model, optimizer, selection, state)
    tell = on_step or (lambda record: None)
    started = time.monotonic() - state["seconds"]
    stopped, first = False, state["step"]
    while not (stopped or selection.has_ended or state["step"] == len(steps)):
        before = time.monotonic()
        micro_batches = steps[state["step"]]
        record = _step(model, optimizer, objective, dataset, micro_batches, config, state["step"], len(steps))
        if state["step"] == first:  # what kernels prepared for themselves lies scattered between tensors that are gone
            release_memory()
        now, counted = time.monotonic(), record.pop("counted")
        tokens = sum(lengths[row] for rows in micro_batches for row in rows) if lengths else counted
        state |= {"step": record["step"], "tokens": state["tokens"] + tokens, "seconds": now - started}
        pace = {"tokens": tokens, "tokens_per_second": tokens / (now - before), "total_steps": len(steps)}
        stopped = bool(tell({**record, **pace}))
        step, is_last = state["step"], state["step"] == len(steps)
        if held_out and config.eval_steps and (is_last or _is_due(config.eval_steps, step)):
            eval_loss = mean_loss(model, objective, held_out)
            selection.note(model, step, eval_loss)
            stopped |= bool(tell({"step": step, "eval_loss": eval_loss, "best_step": selection.best_step}))
        is_last |= selection.has_ended  # what comes after training may fail, and must not cost the run
        if checkpoint_dir is not None and (stopped or is_last or _is_due(config.save_steps, step)):
            saved_state = {**state, **selection.state()}
            save_checkpoint(checkpoint_dir, model, optimizer, saved_state, selection.tensors, config.save_total_limit)
    model.eval()
    finished, kept = selection.has_ended or state["step"] == len(steps), state["step"]
    if finished and selection.tensors:
        selection.restore(model)
        kept = selection.best_step
    return TrainResult(state["step"], len(steps), state["tokens"], time.monotonic() - started, finished, kept)


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    dataset: Sequence[Any],
    micro_batches: list[Rows],
    config: TrainConfig,
    step: int,
    total: int,
) -> Record:
    """One optimizer step; the record says what it did.

    Raises:
        DataError: the loss counts nothing.
        TrainingError: the loss or the gradient is not finite; the weights are those of before the step.
    """
    model.train()
    rate = learning_rate(step, total, config)
    optimizer.zero_grad(set_to_none=True)
    batches = [[dataset[row] for row in rows] for rows in micro_batches]
    first = step * config.gradient_accumulation_steps
    loss, counted = _backward(model, objective, batches, config.seed, first)
    parameters = [p for p in model.parameters() if p.requires_grad]
    total_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    norm = total_norm.item()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        sources = [str(getattr(dataset[row], "source", row)) for rows in micro_batches for row in rows]
        where = first_bad_module(model, lambda: list(_losses(model, objective, batches, config.seed, first)))
        raise TrainingError(
            f"step {step + 1}: loss {loss}, gradient norm {norm}; first bad: {where}; rows: {', '.join(sources)}. "
            "The weights are those of before the step; a lower learning rate or float32 may help"
        )
    torch.nn.utils.clip_grads_with_norm_(parameters, config.max_grad_norm or math.inf, total_norm)
    set_rate(optimizer, rate)
    optimizer.step()
    if not torch.nn.utils.get_total_norm(parameters).isfinite():
        raise TrainingError(f"step {step + 1}: the weights are not finite after it; learning rate {rate} is too high")
    memory = peak_memory_bytes(parameters[0].device)
    record = {"step": step + 1, "loss": loss, "learning_rate": rate, "grad_norm": norm}
    return {**record, "peak_memory_bytes": memory, "counted": counted}


def _backward(
    model: nn.Module, objective: Objective, batches: list[list[Any]], seed: int, first: int
) -> tuple[float, int]:
    """Put the gradient of Σ sum / Σ count into the model; return that loss and Σ count."""
    known = objective.known_count([row for rows in batches for row in rows])
    loss, counted = 0.0, 0
    for total, count in _losses(model, objective, batches, seed, first):
        share = total / known if known else total
        share.backward()
        loss += share.item()
        counted += count
    if not counted:
        raise DataError("the loss counts nothing in the rows of a step")
    if known:
        return loss, counted
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad /= counted
    return loss / counted, counted


def _losses(
    model: nn.Module, objective: Objective, batches: list[list[Any]], seed: int, first: int
) -> Iterator[tuple[torch.Tensor, int]]:
    """Sum and count of each micro-batch of a step, of which the first one is the run's micro-batch `first`."""
    for i, rows in enumerate(batches, start=first):
        set_dropout_step(model, seed, i)
        with _drawing(next(model.parameters()).device, seed * MICRO_BATCH_SEEDS + i):
            found = objective(model, rows)
        yield found


@contextmanager
def _drawing(device: torch.device, seed: int) -> Iterator[None]:
    """What a model of another library draws, such as its own dropout, follows from the seed; then all is as before."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def _resumed(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, selection: Selection, fresh: Record
) -> Record:
    """The state that a run goes on from: that of the newest checkpoint, which is put into the model, or a fresh one."""
    found = checkpoints(folder)
    if not found:
        return fresh
    checkpoint = found[-1]
    if read_json(checkpoint / "state.json").get("run") != fresh["run"]:  # before anything is put into the model
        raise TrainingError(f"{checkpoint}: written by a run with other data or settings, so it cannot be resumed here")
    state, best = load_checkpoint(checkpoint, model, optimizer)
    if state.get("step") != newest_step(folder):
        raise FormatError(
            f"{checkpoint}: state.json says step {state.get('step')!r}; remove the directory to go on without it"
        )
    selection.resume(state, best)
    return {key: state[key] for key in fresh}


def _is_due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0
