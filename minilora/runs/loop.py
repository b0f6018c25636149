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
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilora.adapters.attach import forget_dropout_step, set_dropout_step
from minilora.adapters.find import shared_scratch
from minilora.errors import DataError, FormatError, TrainingError
from minilora.models.recompute import Recompute
from minilora.runs.allocator import kept_memory, release_memory
from minilora.runs.batch import Rows, plan_steps
from minilora.runs.checkpoints import checkpoints, load_checkpoint, newest_step, save_checkpoint, trained_adapters
from minilora.runs.config import TrainConfig
from minilora.runs.diagnose import first_bad_module, peak_memory_bytes
from minilora.runs.evaluate import mean_loss
from minilora.runs.fingerprint import fingerprint
from minilora.runs.flat import Flat, flat_norm
from minilora.runs.objective import GivenLoss, Loss, Objective, TokenLoss
from minilora.runs.optimizer import adamw, learning, learning_rate, set_rate
from minilora.runs.select import Selection
from minilora.storage import read_json

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


@kept_memory()
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
    whole model in float32, as adapters are. While it lasts no other thread may use the model.

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
        DataError: there are no rows, an example has no label, or not one for each token, or a token that the model has
            not; what is counted is nothing; there are none to choose the best weights with; `batch_tokens` with rows
            without `tokens`.
        FormatError: the newest checkpoint is damaged.
        TrainingError: nothing is trainable, or an adapter that does not act; a loss, gradient or weight is not finite;
            a checkpoint belongs to another run; a model that needs `loss`.
    """
    if not torch.is_grad_enabled():
        raise TrainingError("there are no gradients within no_grad or inference_mode")
    config = config or TrainConfig()
    objective = _objective(loss, config)
    adapters = trained_adapters(model)
    if not len(dataset):
        raise DataError("there are no examples to learn from")
    objective.check(model, dataset, held_out)
    if config.selects and not held_out:
        raise DataError("keep best and early_stopping need held-out examples")
    if config.recompute == "auto":
        config = replace(config, recompute=_fitting_recompute(model, dataset, held_out, config, loss))
        objective = _objective(loss, config)
    how, steps = learning(model, config), plan_steps(objective.lengths(dataset), config)
    state: Record = {"step": 0, "tokens": 0, "seconds": 0.0}
    if checkpoint_dir is not None:
        checkpoint_dir = Path(checkpoint_dir)
        state["run"] = fingerprint(dataset, held_out if config.selects else (), config, adapters)
    flat = Flat(model, how)
    try:
        run = _Run(model, flat, adamw(flat, config), objective, dataset, steps, config)
        with shared_scratch(model), _compiled(objective.compilable(model) if config.compile else []):
            return _train(run, state, on_step or (lambda record: None), held_out, checkpoint_dir)
    finally:
        flat.release()
        forget_dropout_step(model)


def _objective(loss: Loss | None, config: TrainConfig) -> Objective:
    return TokenLoss(config) if loss is None else GivenLoss(loss, config)


def _fitting_recompute(
    model: Any, dataset: Sequence[Any], held_out: Sequence[Any], config: TrainConfig, loss: Loss | None
) -> Recompute:
    """What `auto` means here; a loss that is given recomputes what it likes."""
    if loss is not None:
        return "none"
    from minilora.runs.memory import fitting_recompute  # loads a part of PyTorch that is not needed otherwise

    return fitting_recompute(model, dataset, held_out, config)


@contextmanager
def _compiled(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Within it, modules run as torch.compile makes them: at first for a size, and from the second on for any."""
    before = [module._compiled_call_impl for module in modules]  # what `compile` sets; there is no public way back
    for module in modules:
        module.compile()
    try:
        yield
    finally:
        for module, own in zip(modules, before, strict=True):
            module._compiled_call_impl = own


@dataclass(frozen=True)
class _Run:
    """What all steps of a run share."""

    model: nn.Module
    flat: Flat
    optimizer: torch.optim.Optimizer
    objective: Objective
    dataset: Sequence[Any]
    steps: list[list[Rows]]
    config: TrainConfig

    def batches(self, step: int) -> list[Any]:
        """The micro-batches of a step; none after the last one."""
        device = next(self.model.parameters()).device
        plan = self.steps[step] if step < len(self.steps) else []
        return [self.objective.batch([self.dataset[row] for row in rows], device) for rows in plan]

    def sources(self, step: int) -> str:
        """Where the rows of a step come from."""
        return ", ".join(str(getattr(self.dataset[row], "source", row)) for rows in self.steps[step] for row in rows)


def _train(run: _Run, state: Record, tell: OnStep, held_out: Sequence[Any], folder: Path | None) -> TrainResult:
    """Go from the newest checkpoint, or from the beginning, to the end; see `train`."""
    model, config, steps, selection = run.model, run.config, run.steps, Selection(run.config)
    if folder is not None:
        state = _resumed(folder, run, selection, state)
    started = time.monotonic() - state["seconds"]
    stopped, first = False, state["step"]
    batches = run.batches(first)
    while not (stopped or selection.has_ended or state["step"] == len(steps)):
        before = time.monotonic()
        record, batches = _step(run, state["step"], batches)
        if state["step"] == first:  # what kernels prepared for themselves lies scattered between tensors that are gone
            release_memory()
        now, tokens = time.monotonic(), record["tokens"]
        state |= {"step": record["step"], "tokens": state["tokens"] + tokens, "seconds": now - started}
        pace = {"tokens_per_second": tokens / (now - before), "total_steps": len(steps)}
        stopped = bool(tell({**record, **pace}))
        step, is_last = state["step"], state["step"] == len(steps)
        if held_out and config.eval_steps and (is_last or _is_due(config.eval_steps, step)):
            eval_loss = mean_loss(model, run.objective, held_out)
            selection.note(model, step, eval_loss)
            stopped |= bool(tell({"step": step, "eval_loss": eval_loss, "best_step": selection.best_step}))
        is_last |= selection.has_ended  # what comes after training may fail, and must not cost the run
        if folder is not None and (stopped or is_last or _is_due(config.save_steps, step)):
            saved, best = {**state, **selection.state()}, selection.tensors
            save_checkpoint(folder, model, run.flat, run.optimizer, saved, best, config.save_total_limit)
    model.eval()
    finished, kept = selection.has_ended or state["step"] == len(steps), state["step"]
    if finished and selection.tensors:
        selection.restore(model)
        kept = selection.best_step
    return TrainResult(state["step"], len(steps), state["tokens"], time.monotonic() - started, finished, kept)


def _step(run: _Run, step: int, batches: list[Any]) -> tuple[Record, list[Any]]:
    """One optimizer step; the record says what it did. Also the next step's batches.

    Until all is on its way nothing is asked of the device, whose work is only then waited for: once, for all numbers.

    Raises:
        DataError: the loss counts nothing.
        TrainingError: the loss or the gradient is not finite; the weights are those of before the step.
    """
    model, config, segments = run.model, run.config, run.flat.segments
    run.flat.check(model)
    model.train()
    rate = learning_rate(step, len(run.steps), config)
    losses, counted = _backward(run, step, batches)
    tokens = run.objective.tokens(batches)
    norm = flat_norm(segment.gradient for segment in segments)
    is_finite = torch.stack([*losses, norm]).isfinite().all()
    if config.max_grad_norm:
        values = [segment.values for segment in segments]
        torch.nn.utils.clip_grads_with_norm_(values, config.max_grad_norm, norm.where(is_finite, 0))  # 0 cuts nothing
    set_rate(run.optimizer, rate)
    _update(run.optimizer, ~is_finite)
    weight_norm = flat_norm(segment.values for segment in segments)
    upcoming = run.batches(step + 1)
    *shares, grad_norm, length = torch.stack([*losses, norm, weight_norm]).tolist()
    loss = sum(shares)
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        eager = torch.compiler.set_stance("force_eager") if config.compile else nullcontext()
        with eager:  # what is compiled has no hooks
            where = first_bad_module(model, lambda: list(_losses(run, step, batches)))
        raise TrainingError(
            f"step {step + 1}: loss {loss}, gradient norm {grad_norm}; first bad: {where}; rows: {run.sources(step)}. "
            "The weights are those of before the step; a lower learning rate or float32 may help"
        )
    if not math.isfinite(length):
        raise TrainingError(f"step {step + 1}: the weights are not finite after it; learning rate {rate} is too high")
    memory = peak_memory_bytes(norm.device)
    record = {"step": step + 1, "loss": loss, "learning_rate": rate, "grad_norm": grad_norm}
    return {**record, "tokens": counted if tokens is None else tokens, "peak_memory_bytes": memory}, upcoming


def _update(optimizer: torch.optim.Optimizer, is_bad: Tensor) -> None:
    """Let AdamW make its step, unless it is bad: its kernel leaves all as it is then, and nobody has to wait."""
    if is_bad.device.type != "mps" or not is_bad:  # the kernel for MPS takes no notice
        optimizer.found_inf = is_bad.float()  # type: ignore[attr-defined]  # as torch.amp.GradScaler does
        optimizer.step()


def _backward(run: _Run, step: int, batches: list[Any]) -> tuple[list[Tensor], int]:
    """Put the gradient of Σ sum / Σ count into the model; return what each micro-batch adds to that loss, and Σ count.

    Raises:
        DataError: the loss counts nothing.
    """
    known = run.objective.known_count(batches)
    losses, counted = list[Tensor](), 0
    run.flat.zero_grad()
    with run.flat.cast() if run.objective.may_cast else nullcontext():
        for total, count in _losses(run, step, batches):
            share = total / known if known else total
            share.backward()
            losses.append(share.detach().reshape(()))
            counted += count
    run.flat.collect()
    if not counted:
        raise DataError("the loss counts nothing in the rows of a step")
    if not known:
        losses = [loss / counted for loss in losses]
        for segment in run.flat.segments:
            segment.gradient.div_(counted)
    return losses, counted


def _losses(run: _Run, step: int, batches: list[Any]) -> Iterator[tuple[Tensor, int]]:
    """Sum and count of each micro-batch of a step."""
    seed, device = run.config.seed, next(run.model.parameters()).device
    for i, batch in enumerate(batches, start=step * run.config.gradient_accumulation_steps):
        set_dropout_step(run.model, seed, i)
        with _drawing(device, seed * MICRO_BATCH_SEEDS + i):
            found = run.objective(run.model, batch)
        yield found


@contextmanager
def _drawing(device: torch.device, seed: int) -> Iterator[None]:
    """What a model of another library draws, such as its own dropout, follows from the seed on a CPU and on CUDA; then
    their generators are as before.
    """
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def _resumed(folder: Path, run: _Run, selection: Selection, fresh: Record) -> Record:
    """The state that a run goes on from: that of the newest checkpoint, which is put into the model, or a fresh one."""
    found = checkpoints(folder)
    if not found:
        return fresh
    checkpoint = found[-1]
    if read_json(checkpoint / "state.json").get("run") != fresh["run"]:  # before anything is put into the model
        raise TrainingError(f"{checkpoint}: written by a run with other data or settings, so it cannot be resumed here")
    state, best = load_checkpoint(checkpoint, run.model, run.flat, run.optimizer)
    if state.get("step") != newest_step(folder):
        raise FormatError(
            f"{checkpoint}: state.json says step {state.get('step')!r}; remove the directory to go on without it"
        )
    selection.resume(state, best)
    return {key: state[key] for key in fresh}


def _is_due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0
