"""The training loop around the step of `minilora.training`: the plan, evaluation, checkpoints and records."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minilora.adapters.attach import describe_base
from minilora.adapters.config import LoraConfig
from minilora.errors import DataError, FormatError, TrainingError, check_types
from minilora.llama import Llama
from minilora.models.bitsandbytes import QuantizeConfig, is_finite
from minilora.models.shard import held_bytes, is_sharded, whole
from minilora.runs import checkpoints, world
from minilora.runs.config import TrainConfig
from minilora.runs.dataset import lengths_of, sizes_of
from minilora.runs.evaluate import mean_loss
from minilora.runs.memory import Plan, choose_plan
from minilora.runs.objective import (
    UNKNOWN,
    Objective,
    build_optimizer,
    check_token_loss,
    first_bad_module,
    rate_of_step,
    trained_parameters,
)
from minilora.runs.sampler import MicroBatch, StepPlan, plan_steps, seeded, set_dropout_step
from minilora.runs.system import (
    has_room_to_keep,
    keep_memory,
    peak_memory_bytes,
    release_memory,
    released_memory,
    return_memory,
)
from minilora.training import Loss, accumulate, parameters_of, total_norm, update

Record = dict[str, Any]  # one line of metrics.jsonl
OnStep = Callable[[Record], bool | None]
SAVES, SAVE_SECONDS = 10, 600  # checkpoints in a run, and the longest time between two, unless `save_steps` is given
ADVICE = "a lower learning rate or float32 may help"


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


@released_memory()
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
    whole model in float32, as adapters are. No other thread may use the model meanwhile: to generate or to train is
    refused.

    Where torch.distributed is initialized, its ranks share the work: each calls `train` with the same model and all
    rows, and computes some of the micro-batches of each step. The first rank writes the checkpoints. A model in
    `DistributedDataParallel` or FSDP is one of any module, for which `loss` is given.

    Args:
        model: a `Llama`; with `loss`, any module.
        dataset: what `load_dataset` returns; with `loss`, rows of any kind.
        config: by default `TrainConfig()`.
        on_step: called with a record after each step and each evaluation; if it returns True, on any rank, the run
            stops there, with a checkpoint.
        held_out: rows to evaluate every `eval_steps` and after the last step.
        checkpoint_dir: where checkpoints are written: every `save_steps`, by default about ten times and at least every
            ten minutes, and when the run ends or is stopped. If it has some already, the run resumes from the newest
            that is as it was written, and ends in the same bytes as if it had never stopped.
        loss: (model, rows) -> (sum, count): the sum of the losses of some rows, and how many there are, such as
            labelled tokens. A step's loss is Σ sum / Σ count. A record's `tokens` are those of rows that have `tokens`,
            else the counts. By default the loss of tokens.

    Raises:
        DataError: there are no rows; an example has no label, not one for each token, or a token that the model does
            not have; the loss counts nothing; there are no held-out rows to choose the best weights with; or
            `batch_tokens` with rows without `tokens`.
        FormatError: the newest checkpoint holds other tensors than the run trains.
        TrainingError: nothing is trainable, or an adapter that is not active; a loss, gradient or weight is not finite;
            a checkpoint belongs to another run; the model needs `loss`; a rank does not
            answer, or has trained something else than the first one.
    """
    check_types(train, locals())
    if not torch.is_grad_enabled():
        raise TrainingError("there are no gradients within no_grad or inference_mode")
    config = config or TrainConfig()
    adapters = checkpoints.trained_adapters(model)
    if not len(dataset):
        raise DataError("there are no examples to learn from")
    if loss is None:
        check_token_loss(model, dataset, held_out)
    if config.selects and not len(held_out):
        raise DataError("keep best and early_stopping need held-out examples")
    if config.gradient_checkpointing == "auto" and loss is None:
        config = _with_fitting_checkpointing(model, dataset, held_out, config, next(iter(adapters.values()), None))
    elif config.gradient_checkpointing == "auto":
        config = replace(config, gradient_checkpointing="none")  # a given loss recomputes by itself
    objective = Objective(config, loss)
    steps = plan_steps(objective.lengths(dataset), config)
    run = _Job(model, build_optimizer(model, config), objective, dataset, steps, config)
    folder, state = None if checkpoint_dir is None else Path(checkpoint_dir), checkpoints.State()
    if folder is not None and any(is_sharded(p) for p in trained_parameters(run.optimizer).values()):
        raise TrainingError("checkpoint_dir: what is trained is sharded by FSDP; write checkpoints in on_step")
    if folder is not None or world.size() > 1:
        state.run = checkpoints.fingerprint(dataset, held_out if config.selects else (), config, adapters)
    if len({*world.all_gather(repr((config, len(dataset), len(held_out), state.run)))}) > 1:
        raise TrainingError("the processes of the run differ in their data or settings; each needs all rows")
    try:
        if any(map(is_sharded, model.parameters())):
            return_memory()
        return _run_steps(run, state, on_step or (lambda record: None), held_out, folder)
    finally:
        for parameter in trained_parameters(run.optimizer).values():
            parameter.grad = None
        set_dropout_step(model, None)


def _with_fitting_checkpointing(
    model: Any, dataset: Sequence[Any], held_out: Sequence[Any], config: TrainConfig, lora: LoraConfig | None
) -> TrainConfig:
    """Choose the gradient checkpointing with which the run fits into memory, beside the loaded model."""
    if not isinstance(model, Llama):
        raise TrainingError(
            f"{type(model).__name__}: gradient_checkpointing 'auto' is for minilora's own decoders; name a way"
        )
    weight = model.model.embed_tokens.weight
    plan = Plan(
        model.config,
        lora,
        config,
        QuantizeConfig("none" if describe_base(model)["quantize"] == "none" else "nf4"),
        weight.dtype,
        weight.device,
        sizes_of(dataset),
        [lengths_of(held_out)],
        world.size(),
        "base" if any(map(is_sharded, model.parameters())) else "none",
    )
    return choose_plan(plan, plan.shard, held=held_bytes(model))[0].training


@dataclass(frozen=True)
class _Job:
    """What all steps of a run share."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    objective: Objective
    dataset: Sequence[Any]
    steps: StepPlan
    config: TrainConfig

    def batches(self, step: int) -> list[MicroBatch]:
        """Return the micro-batches of a step that this rank computes; none after the last step."""
        device, first = next(self.model.parameters()).device, step * self.config.gradient_accumulation_steps
        plan = self.steps[step] if step < len(self.steps) else []
        dealt = world.split_for_rank(list(enumerate(plan, first)))
        read = ((n, [self.dataset[row] for row in rows], counts) for (n, rows), counts in dealt)
        return [MicroBatch(n, self.objective.batch(rows, device), counts) for n, rows, counts in read]

    def loss(self, model: nn.Module, batch: MicroBatch) -> tuple[Tensor, int]:
        """Return the sum of the losses of a micro-batch, and how many there are: 0 of one that does not count."""
        total, number = self.objective(model, batch.rows)
        return (total, number) if batch.is_counted else (0 * total, 0)


def _run_steps(
    run: _Job, state: checkpoints.State, on_step: OnStep, held_out: Sequence[Any], folder: Path | None
) -> TrainResult:
    """Run all steps that are left after the newest checkpoint; see `train`."""
    model, config, total = run.model, run.config, len(run.steps)
    state, best, damaged = _resume(run, state, folder)
    _check_ranks(run, state.step)
    state.total_steps = total
    started, patience = time.monotonic() - state.seconds, config.early_stopping or math.inf

    def is_done() -> bool:
        return state.step == total or state.stale >= patience

    stopped, first, batches = False, state.step, run.batches(state.step)
    save_steps, saved = math.ceil(total / SAVES) if config.save_steps is None else config.save_steps, time.monotonic()
    while not (stopped or is_done()):
        before = time.monotonic()
        record, batches = _step(run, state.step, batches)
        if state.step == first:  # kernels' own buffers of the first step leave holes in the memory
            release_memory()
            if has_room_to_keep() and not any(map(is_sharded, model.parameters())):
                keep_memory()
        now, step = time.monotonic(), state.step + 1
        state.step, state.tokens, state.seconds = step, state.tokens + record["tokens"], now - started
        record |= {"tokens_per_second": record["tokens"] / (now - before), "total_steps": total}
        is_late = config.save_steps is None and time.monotonic() - saved >= SAVE_SECONDS
        stopped, is_late = map(bool, world.sum_over_ranks(bool(on_step(record)), is_late))  # on any rank
        if len(held_out) and config.eval_steps and (step == total or step % config.eval_steps == 0):
            eval_loss = mean_loss(model, run.objective, held_out)
            if state.note(eval_loss) and config.keep == "best":
                best = {name: tensor.detach().clone() for name, tensor in checkpoints.trained_tensors(model).items()}
            evaluation = {"step": step, "eval_loss": eval_loss, "best_step": state.best_step}
            stopped |= world.any_rank(bool(on_step(evaluation)))
        is_due = is_late or (save_steps and step % save_steps == 0)
        if is_due or stopped or is_done():  # done: what follows training may fail
            _check_ranks(run, step)
            if folder is not None and world.is_main_process():
                checkpoints.save_checkpoint(folder, model, run.optimizer, state, best, config.save_total_limit)
            world.barrier()  # torchrun ends all ranks when one has ended
            saved = time.monotonic()
    model.eval()
    finished, kept = is_done(), state.step
    if finished and best:
        checkpoints.restore(model, best)
        kept = state.best_step
    return TrainResult(state.step, total, state.tokens, time.monotonic() - started, finished, kept, damaged)


def _resume(
    run: _Job, state: checkpoints.State, folder: Path | None
) -> tuple[checkpoints.State, dict[str, Tensor], tuple[str, ...]]:
    """Restore the newest checkpoint, if any; return the state, the best weights, and what is wrong with newer ones."""
    newest, damaged = world.run_on_rank0(lambda: checkpoints.newest_checkpoint(folder) if folder else (None, ()))
    if folder is None or newest is None:
        return state, {}, damaged
    checkpoints.check_extension(newest, len(run.steps), run.config, state.run)
    state, best = checkpoints.load_checkpoint(newest, run.model, run.optimizer, state.run)
    if run.config.keep == "best" and state.best_step and not best:
        raise FormatError(f"{newest}: lacks best.safetensors, the weights of step {state.best_step}")
    if world.is_main_process():
        checkpoints.prune(folder, state.step, run.config.save_total_limit)
    return state, best, damaged


def _check_ranks(run: _Job, step: int) -> None:
    """Check that all ranks hold the same parameters, and give all the first one's buffers, as those of a batch norm."""
    trained = trained_parameters(run.optimizer)
    world.check_equal([*trained.values()], f"step {step}")
    world.broadcast_(tensor for name, tensor in checkpoints.trained_tensors(run.model).items() if name not in trained)


def _step(run: _Job, step: int, batches: list[MicroBatch]) -> tuple[Record, list[MicroBatch]]:
    """Make one optimizer step; return its record, and the micro-batches of the next step.

    It waits for the device once, after the step and the copies of the next micro-batches are queued.
    """
    model, config, trained = run.model, run.config, trained_parameters(run.optimizer)
    now = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if changed := sorted(name for name in trained | now if trained.get(name) is not now.get(name)):
        raise TrainingError(f"{changed[:3]}: what is trained has changed since the run began; change it between runs")
    rate = rate_of_step(step, len(run.steps), config)
    for group in run.optimizer.param_groups:
        group["lr"] = rate * group["factor"]
    own_tokens = run.objective.tokens([batch.rows for batch in batches if batch.is_counted])
    total, count = accumulate(model, run.optimizer, seeded(model, batches, config.seed), run.loss)
    world.all_reduce_([*(parameter.grad for parameter in parameters_of(run.optimizer)), total])
    count, tokens, unknown = map(int, world.sum_over_ranks(count, own_tokens or 0, own_tokens is None))
    done = update(run.optimizer, total, count, config.max_grad_norm)
    weight_norm = total_norm([p.detach() for p in trained.values()])
    states = {name: run.optimizer.state[p] for name, p in trained.items()}  # infinite squares would stop learning
    moments = {f"the second moment of {name}": held["exp_avg_sq"] for name, held in states.items() if held}
    largest_moment = whole(torch.nn.utils.get_total_norm([*moments.values()], math.inf)).to(weight_norm)
    upcoming = run.batches(step + 1)
    norms = torch.stack([done.loss, done.grad_norm, weight_norm, largest_moment])
    loss, grad_norm, weight, moment = norms.tolist()  # waits for the device
    record: Record = {
        "step": step + 1,
        "loss": loss,
        "learning_rate": rate,
        "grad_norm": grad_norm,
        "tokens": count if unknown else tokens,
        "peak_memory_bytes": peak_memory_bytes(norms.device),
    }
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        problem = f"step {step + 1}: loss {loss}, gradient norm {grad_norm}; {_first_nonfinite(run, step, batches)}"
        state = checkpoints.trained_tensors(model).values()  # weights, and buffers such as those of a batch norm
        is_beyond_repair = world.any_rank(not all(map(is_finite, state)))
        if config.on_nonfinite == "stop" or is_beyond_repair:
            raise TrainingError(f"{problem}. The weights are those of before the step; {ADVICE}")
        return record | {"loss": None, "grad_norm": None, "skipped": problem}, upcoming
    if not (math.isfinite(weight) and math.isfinite(moment)):
        tensors = (trained | moments).items()
        bad = next((name for name, tensor in tensors if not is_finite(tensor)), "the norm of the weights")
        raise TrainingError(f"step {step + 1}: {bad} is not finite after it; rows: {_sources(run, step)}; {ADVICE}")
    return record, upcoming


def _first_nonfinite(run: _Job, step: int, batches: Sequence[MicroBatch]) -> str:
    """Compute a step again, and return where its first number that is not finite is, and of which rows."""
    again = seeded(run.model, batches, run.config.seed)
    found = world.all_gather(first_bad_module(run.model, lambda: [run.loss(run.model, batch) for batch in again]))
    # Another rank may have the bad rows. Gradients are sums over all ranks by now.
    where = min(found, key=lambda place: (place == UNKNOWN, place.startswith("gradient")))
    return f"first bad: {where}; rows: {_sources(run, step)}"


def _sources(run: _Job, step: int) -> str:
    """Return where the rows of a step are from."""
    return ", ".join(str(getattr(run.dataset[row], "source", row)) for rows in run.steps[step] for row in rows)
