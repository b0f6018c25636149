"""The training loop around the step of `minilora.training`: the plan, evaluation, checkpoints and records."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilora.errors import DataError, TrainingError
from minilora.runs import checkpoints, processes
from minilora.runs.evaluate import mean_loss
from minilora.runs.memory import kept_memory, peak_memory_bytes, return_memory
from minilora.runs.objective import Objective, build_optimizer, check_token_loss, rate_of_step
from minilora.runs.sampler import MicroBatch, Step, plan_steps, seeded, set_dropout_step
from minilora.runs.settings import TrainConfig
from minilora.training import Loss, accumulate, parameters_of, update

Record = dict[str, Any]  # one line of metrics.jsonl
OnStep = Callable[[Record], bool | None]
# Unless `save_steps` is given:
SAVES = 10  # checkpoints in a run
SAVE_SECONDS = 600  # the longest time between two


@dataclass(frozen=True)
class TrainResult:
    """A summary of a run, including the parts before it was resumed.

    `finished` is False if `on_step` stopped it; `kept` is the step whose weights the model holds now; `damaged` says
    what is wrong with checkpoints that were skipped.
    """

    steps: int
    total_steps: int
    tokens: int
    seconds: float
    finished: bool
    kept: int
    damaged: tuple[str, ...] = ()


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
    """Train the parameters that require grad: those of an attached adapter or, without one, the model itself.

    Weights are trained in their own dtype. In bfloat16 most updates of a weight are too small to change it: train a
    whole model in float32, as adapters are. No other thread may use the model meanwhile.

    Where torch.distributed is initialized, its ranks share the work: each calls `train` with the same model and all
    rows, and computes some of the micro-batches of each step. The first rank writes the checkpoints. A model wrapped
    in DDP needs `loss`, like any other module.

    Args:
        model: a `Llama`; with `loss`, any module.
        dataset: what `load_dataset` returns; with `loss`, rows of any kind. With checkpoints or several ranks their
            content is compared, so rows consist of numbers, text, tensors, arrays, lists, mappings and data classes.
        config: by default `TrainConfig()`.
        on_step: called with a record after each step and each evaluation; if it returns True, on any rank, the run
            stops there, with a checkpoint.
        held_out: rows to evaluate every `eval_steps` and after the last step.
        checkpoint_dir: where checkpoints are written: every `save_steps`, by default about ten times and at least every
            ten minutes, and when the run ends or is stopped. If it has some already, the run resumes from the newest
            that is as it was written, and ends in the same bytes as if it had never stopped.
        loss: (model, rows) -> (sum, count): the sum of the losses of some rows, and how many there are, such as
            labelled tokens. A step's loss is Σ sum / Σ count. A record's `tokens` are those of rows that have `tokens`,
            or the count if none has. PyTorch's random state is set from the run's seed and the micro-batch before each
            call, so `generate` without a seed draws anew at each step, and after a resume the same as without it. By
            default the loss of tokens.

    Raises:
        DataError: there are no rows; an example has no label, not one for each token, or a token that the model does
            not have; the loss counts nothing; there are no held-out rows to choose the best weights with; or
            rows cannot be compared.
        FormatError: the newest checkpoint holds other tensors than the run trains, or what is trained cannot be saved.
        OSError: checkpoints cannot be written.
        TrainingError: nothing is trainable, or an inactive adapter is; FSDP has divided what is trained; a loss or
            gradient is not finite; a checkpoint belongs to another run; the model needs `loss`;
            `gradient_checkpointing` is "auto", which the command replaces; a rank does not answer.
    """
    if not torch.is_grad_enabled():
        raise TrainingError("there are no gradients within no_grad or inference_mode")
    config = config or TrainConfig()
    if config.gradient_checkpointing == "auto":
        raise TrainingError("gradient_checkpointing 'auto' is chosen by the command; name none, mlp or block")
    adapters = checkpoints.trained_adapters(model)
    if not len(dataset):
        raise DataError("there are no examples to learn from")
    if loss is None:
        check_token_loss(model, dataset, held_out)
    if config.selects and not len(held_out):
        raise DataError("keep best and early_stopping need held-out examples")
    objective = Objective(config, loss)
    steps = plan_steps(len(dataset), config)
    job = _Job(model, build_optimizer(model, config), objective, dataset, steps, config)
    folder = None if checkpoint_dir is None else Path(checkpoint_dir)
    if processes.any_sharded(model.parameters()):
        return_memory()  # kept memory would fragment between the blocks that are gathered
    if processes.any_sharded(parameters_of(job.optimizer)):
        raise TrainingError("what is trained is divided among the processes, as by FSDP; each needs it whole")
    run = ""
    if folder is not None or processes.size() > 1:
        run = checkpoints.fingerprint(dataset, held_out if config.selects else (), config, adapters)
    if len({*processes.all_gather(repr((config, len(dataset), len(held_out), run)))}) > 1:
        raise TrainingError("the processes of the run differ in their data or settings; each needs all rows")
    if folder is not None:
        processes.run_on_rank0(lambda: checkpoints.try_to_save(folder, model))
    try:
        return _run_steps(job, run, on_step or (lambda record: None), held_out, folder)
    finally:
        for parameter in parameters_of(job.optimizer):
            parameter.grad = None
        set_dropout_step(model, None)


class _Schedule:
    """When a run evaluates and saves."""

    def __init__(self, config: TrainConfig, total: int):
        self.total = total
        self.eval_steps = config.eval_steps
        self.is_timed = config.save_steps is None
        self.save_steps = math.ceil(total / SAVES) if config.save_steps is None else config.save_steps
        self.saved = time.perf_counter()

    def evaluates(self, step: int) -> bool:
        """Return whether an evaluation follows a step."""
        return self.eval_steps is not None and (step == self.total or step % self.eval_steps == 0)

    def saves(self, step: int) -> bool:
        """Return whether a checkpoint follows a step: every `save_steps`, or late on any rank."""
        is_late = self.is_timed and processes.any_rank(time.perf_counter() - self.saved >= SAVE_SECONDS)
        return is_late or (self.save_steps > 0 and step % self.save_steps == 0)


@dataclass(frozen=True)
class _Job:
    """What all steps of a run share."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    objective: Objective
    dataset: Sequence[Any]
    steps: list[Step]
    config: TrainConfig

    def batches(self, step: int) -> list[MicroBatch]:
        """Return the micro-batches of a step that this rank computes."""
        first = step * self.config.gradient_accumulation_steps
        dealt = processes.split_for_rank(list(enumerate(self.steps[step], first)))
        return [MicroBatch(n, [self.dataset[row] for row in rows], counts) for (n, rows), counts in dealt]

    def loss(self, model: nn.Module, batch: MicroBatch) -> tuple[Tensor, int]:
        """Return the sum of the losses of a micro-batch, and how many there are: 0 of one that does not count."""
        total, number = self.objective(model, batch.rows)
        return (total, number) if batch.is_counted else (0 * total, 0)


def _run_steps(job: _Job, run: str, on_step: OnStep, held_out: Sequence[Any], folder: Path | None) -> TrainResult:
    """Make all steps that are left after the newest checkpoint of a run with that fingerprint; see `train`."""
    model = job.model
    config = job.config
    total = len(job.steps)
    state, best, damaged = _resume(job, run, folder)
    processes.broadcast_(checkpoints.trained_tensors(model).values())
    schedule = _Schedule(config, total)
    patience = config.early_stopping or math.inf
    stopped = False
    started = time.perf_counter() - state.seconds

    def is_done() -> bool:
        return state.step == total or state.stale >= patience

    while not (stopped or is_done()):
        before = time.perf_counter()
        record = _step(job, state.step)
        now = time.perf_counter()
        state.step += 1
        state.tokens += record["tokens"]
        state.seconds = now - started
        record |= {"tokens_per_second": record["tokens"] / (now - before), "total_steps": total}
        stopped = processes.any_rank(bool(on_step(record)))
        if len(held_out) and schedule.evaluates(state.step):
            eval_loss = mean_loss(model, job.objective, held_out)
            if state.note(eval_loss) and config.keep == "best":
                best = {name: tensor.detach().clone() for name, tensor in checkpoints.trained_tensors(model).items()}
            evaluation = {"step": state.step, "eval_loss": eval_loss, "best_step": state.best_step}
            stopped |= processes.any_rank(bool(on_step(evaluation)))
        if schedule.saves(state.step) or stopped or is_done():  # done: what follows training may fail
            processes.broadcast_(checkpoints.trained_tensors(model).values())
            if folder is not None and processes.is_main_process():
                checkpoints.save_checkpoint(folder, model, job.optimizer, state, best, config.save_total_limit)
            processes.barrier()  # torchrun ends all ranks when one has ended
            schedule.saved = time.perf_counter()
    model.eval()
    finished = is_done()
    kept = state.step
    if finished and best:
        checkpoints.restore(model, best)
        kept = state.best_step
    return TrainResult(state.step, total, state.tokens, time.perf_counter() - started, finished, kept, damaged)


def _step(job: _Job, step: int) -> Record:
    """Make one optimizer step, and return its record.

    Raises:
        TrainingError: the loss or the gradient is not finite.
    """
    model = job.model
    config = job.config
    optimizer = job.optimizer
    rate = rate_of_step(step, len(job.steps), config)
    for group in optimizer.param_groups:
        group["lr"] = rate
    batches = job.batches(step)
    with closing(seeded(model, batches, config.seed)) as micro_batches:
        total, count = accumulate(model, optimizer, micro_batches, job.loss)
    processes.all_reduce_([*(parameter.grad for parameter in parameters_of(optimizer)), total])
    own_tokens = sum(len(getattr(row, "tokens", ())) for batch in batches if batch.is_counted for row in batch.rows)
    count, tokens = map(int, processes.sum_over_ranks(count, own_tokens))
    norms = torch.stack(update(optimizer, total, count, config.max_grad_norm))
    loss, grad_norm = norms.tolist()  # waits for the device, once a step
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        sources = ", ".join(str(getattr(job.dataset[row], "source", row)) for rows in job.steps[step] for row in rows)
        raise TrainingError(
            f"step {step + 1}: loss {loss}, gradient norm {grad_norm}; rows: {sources}. The weights are those of "
            "before the step; a lower learning rate or float32 may help"
        )
    return {
        "step": step + 1,
        "loss": loss,
        "learning_rate": rate,
        "grad_norm": grad_norm,
        "tokens": tokens or count,
        "peak_memory_bytes": peak_memory_bytes(norms.device),
    }


def _resume(job: _Job, run: str, folder: Path | None) -> tuple[checkpoints.State, dict[str, Tensor], tuple[str, ...]]:
    """Restore the newest checkpoint, if any; return the state, the best weights, and what is wrong with newer ones."""
    total = len(job.steps)
    newest, damaged = processes.run_on_rank0(lambda: checkpoints.newest_checkpoint(folder) if folder else (None, ()))
    if folder is None or newest is None:
        return checkpoints.State(run, total_steps=total), {}, damaged
    state, best = checkpoints.load_checkpoint(newest, job.model, job.optimizer, run, total)
    if processes.is_main_process():
        checkpoints.prune(folder, state.step, job.config.save_total_limit)  # a crash may have left some
    return state, best, damaged
