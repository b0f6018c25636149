"""The training loop around the step of `minilora.training`: the plan, evaluation, checkpoints and records."""

import copy
import inspect
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from minilora.errors import DataError, TrainingError
from minilora.llama import Decoder
from minilora.lora import LoraAdapter
from minilora.models.fsdp import is_sharded
from minilora.runs import checkpoints, processes, sampler
from minilora.runs.evaluate import Metrics, as_numbers, check_examples, example_loss, mean_loss, means
from minilora.runs.memory import peak_memory_bytes
from minilora.runs.settings import TrainConfig
from minilora.training import accumulate, adamw, learning_rate, parameters_of, update

Record = dict[str, Any]  # one line of metrics.jsonl
OnStep = Callable[[Record], bool | None]
LossOfRows = Callable[..., tuple[Tensor, int, Metrics]]  # (model, rows, step=number) -> sum, count, metrics
BuildOptimizer = Callable[[list[nn.Parameter]], Optimizer]
# Of the record of a step:
KEYS = {"step", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "peak_memory_bytes", "total_steps"}
SAVES = 10  # checkpoints in a run, unless `save_steps` is given
SAVE_SECONDS = 600  # the longest time between two


@dataclass(frozen=True)
class TrainResult:
    """A summary of a run, including the parts before it was resumed.

    `finished` is False if `on_step` stopped it; `kept` is the step whose weights the model has now; `damaged` lists
    what is wrong with checkpoints that were skipped; `resumed_from` is the step of the checkpoint from which this call
    resumed, so a call that found a finished run, and trained nothing, has it equal to `steps`.
    """

    steps: int
    total_steps: int
    tokens: int
    seconds: float
    finished: bool
    kept: int
    damaged: tuple[str, ...] = ()
    resumed_from: int = 0


def train(
    model: nn.Module,
    dataset: Sequence[Any],
    config: TrainConfig | None = None,
    on_step: OnStep | None = None,
    held_out: Sequence[Any] = (),
    checkpoint_dir: str | Path | None = None,
    loss: Callable[..., Any] | None = None,
    optimizer: BuildOptimizer | None = None,
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
        held_out: rows to evaluate after the last step and, with `eval_steps`, every so many steps.
        checkpoint_dir: where checkpoints are written: every `save_steps`, by default about ten times and at least every
            ten minutes, and when the run ends or is stopped. If it has some already, the run resumes from the newest
            undamaged one, and ends in the same bytes as if it had never stopped. A run with other rows, settings,
            adapters, loss, optimizer, base weights or start values is refused. Of the loss, the name and the plain
            arguments of a `partial` are compared; of the base, up to 1024 numbers of each frozen parameter; of what is
            trained, 64 numbers, which have to be those of the start or of the checkpoint.
        loss: (model, rows) -> (sum, count): the sum of the losses of some rows, and how many there are, such as
            labelled tokens. A step's loss is Σ sum / Σ count. By default the loss of tokens.
            (sum, count, metrics) adds metrics to the records, such as {"reward": (sum, count)}, whose means are
            `reward` and, in an evaluation, `eval_reward`. A loss with a parameter `step` receives the step of the
            record. `tokens` in a record counts the tokens of rows that have `tokens`, or is the count if none has.
            PyTorch's random state is set from the run's seed and the micro-batch before each call, so `generate`
            without a seed draws new samples at each step, and a resumed run draws the same ones.
        optimizer: makes an optimizer of the list of trainable parameters; by default AdamW. The `lr` of each of its
            parameter groups is the peak of the schedule. With checkpoints, its `state` may contain only numbers and
            tensors, for each parameter.

    Raises:
        DataError: there are no rows; an example has not a label for each token, or has a token that the model does
            not have; the loss counts nothing; there are no held-out rows to choose the best weights with; or
            rows cannot be compared.
        FormatError: the newest checkpoint has other tensors than the run trains, or what is trained cannot be saved.
        OSError: checkpoints cannot be written.
        TrainingError: nothing is trainable, or an inactive adapter is; FSDP has divided what is trained; a loss or
            gradient is not finite; a checkpoint belongs to another run; the model needs `loss`;
            `gradient_checkpointing` is "auto", which the command replaces; a rank does not answer; the optimizer has
            other parameters than the trainable ones, or keeps what cannot be saved.
    """
    config = config or TrainConfig()
    on_step = on_step or (lambda record: None)
    folder = None if checkpoint_dir is None else Path(checkpoint_dir)
    optim, run = _check_run(model, dataset, held_out, config, loss, folder, optimizer)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)  # now, not after a tenth of the run, if it cannot be written
    checkpointing: Any = config.gradient_checkpointing  # not "auto"
    compute_loss = _checked(loss or partial(example_loss, checkpointing=checkpointing))
    peaks = [group.setdefault("lr", config.learning_rate) for group in optim.param_groups]
    adapters = sampler.adapters_with_dropout(model)
    steps = sampler.plan_steps(len(dataset), config)
    total = len(steps)
    warmup = warmup_steps(config, total)
    save_steps = math.ceil(total / SAVES) if config.save_steps is None else config.save_steps
    limit = config.save_total_limit
    try:
        processes.broadcast_(checkpoints.trained_tensors(model).values())
        state, best, damaged = _resume(model, optim, run, total, folder, limit)
        resumed_from = state.step
        stopped, finished = False, state.step == total
        saved = time.perf_counter()
        started = saved - state.seconds
        while not (stopped or finished):
            before = time.perf_counter()
            for group, peak in zip(optim.param_groups, peaks, strict=True):
                group["lr"] = learning_rate(state.step, total, peak, warmup, config.lr_scheduler)
            numbered = list(enumerate(steps[state.step], state.step * config.gradient_accumulation_steps))
            own = processes.split_for_rank(numbered)
            batches = [sampler.MicroBatch(n, [dataset[row] for row in rows], counts) for (n, rows), counts in own]
            record = _step(model, optim, batches, compute_loss, adapters, config, state.step)
            if not (math.isfinite(record["loss"]) and math.isfinite(record["grad_norm"])):
                raise _not_finite(record, dataset, steps[state.step])
            now = time.perf_counter()
            state.step += 1
            state.tokens += record["tokens"]
            state.seconds = now - started
            stops = on_step({**record, "tokens_per_second": record["tokens"] / (now - before), "total_steps": total})
            finished = state.step == total
            if len(held_out) and (finished or state.step % (config.eval_steps or total) == 0):
                scores = _evaluate(model, partial(compute_loss, step=state.step), held_out, config, loss is None)
                if state.record_evaluation(scores["eval_loss"]) and config.keep == "best":
                    best = {name: t.detach().clone() for name, t in checkpoints.trained_tensors(model).items()}
                stops = on_step({"step": state.step, **scores, "best_step": state.best_step}) or stops
            is_late = config.save_steps is None and time.perf_counter() - saved >= SAVE_SECONDS
            stopped, is_late = map(any, zip(*processes.all_gather((bool(stops), is_late)), strict=True))
            is_due = save_steps > 0 and state.step % save_steps == 0
            if stopped or finished or is_late or is_due:  # finished: what follows training may fail
                processes.broadcast_(checkpoints.trained_tensors(model).values())
                if folder is not None:
                    processes.run_on_rank0(checkpoints.save_checkpoint, folder, model, optim, state, best, limit)
                saved = time.perf_counter()
    finally:
        optim.zero_grad()
        sampler.seed_dropout(adapters, None)
    model.eval()
    kept = state.step
    if finished and best:
        checkpoints.restore(model, best)
        kept = state.best_step
    seconds = time.perf_counter() - started
    return TrainResult(state.step, total, state.tokens, seconds, finished, kept, damaged, resumed_from)


def _check_run(
    model: nn.Module,
    dataset: Sequence[Any],
    held_out: Sequence[Any],
    config: TrainConfig,
    loss: Callable[..., Any] | None,
    folder: Path | None,
    build: BuildOptimizer | None,
) -> tuple[Optimizer, dict[str, Any]]:
    """Check what `train` is given; return the optimizer, and a fingerprint if a checkpoint or other rank needs it."""
    if config.gradient_checkpointing == "auto":
        raise TrainingError("gradient_checkpointing 'auto' works only in `minilora finetune`; give none, mlp or block")
    checkpoints.trained_adapters(model)
    if not len(dataset):
        raise DataError("there are no examples to train on")
    if loss is None:
        if not isinstance(getattr(model, "model", None), Decoder):
            raise TrainingError(
                f"{type(model).__name__}: the loss of tokens needs a minilora decoder as `model.model`; "
                "give loss=, a function (model, rows) -> (sum, count)"
            )
        check_examples(model, [*dataset, *held_out])
    if config.keep == "best" and not len(held_out):
        raise DataError("keep is 'best', which needs held-out examples")
    optimizer = build_optimizer(model, config, build)
    if build and folder is not None:
        before = copy.deepcopy(optimizer.state_dict())
        checkpoints.init_optimizer_state(optimizer, model)
        optimizer.load_state_dict(before)
    run: dict[str, Any] = {}
    if folder is not None or processes.size() > 1:
        run = checkpoints.fingerprint(model, dataset, held_out, config, loss, repr(optimizer) if build else "")
    if processes.size() > 1:
        if any(is_sharded(p) for p in model.parameters() if p.requires_grad):
            raise TrainingError("the trained parameters are sharded, as by FSDP; every process needs them whole")
        if differing := processes.differing_keys({**run, "config": config}):
            what = ", ".join(differing)
            raise TrainingError(f"the processes of the run differ in data or settings ({what}); each needs all rows")
    return optimizer, run


def _checked(loss: Callable[..., Any]) -> LossOfRows:
    """Return a loss that raises an error unless the given one returns (sum, count) or (sum, count, metrics)."""
    takes_step = "step" in inspect.signature(loss).parameters

    def compute(model: Any, rows: Any, step: int) -> tuple[Tensor, int, Metrics]:
        result = loss(model, rows, step=step) if takes_step else loss(model, rows)
        try:
            part, count, *more = result
            number = float(count)
            metrics = {name: (_number(total), _number(count)) for name, (total, count) in dict(*more).items()}
        except (TypeError, ValueError, RuntimeError):
            part, number, metrics = None, 0.0, {}
        if not isinstance(part, Tensor) or part.numel() != 1 or number < 0 or not number.is_integer():
            raise TrainingError(
                "loss must return (sum, count), a tensor of one number and a whole number, or (sum, count, metrics) "
                f'with metrics {{"name": (sum, count), …}}; found {result!r:.80}'
            )
        if taken := [name for name in metrics if name in KEYS or name.startswith("eval_")]:
            raise TrainingError(f"a metric cannot be called {taken[0]!r}: records have a field of that name")
        return part, int(number), metrics

    return compute


def _number(value: Any) -> Any:
    """Return a number or, of another device than the CPU, a tensor of it, for which nothing waits yet."""
    if isinstance(value, Tensor):
        return float(value.item()) if value.is_cpu else value.detach().reshape(())
    return float(value)


def build_optimizer(model: nn.Module, config: TrainConfig, build: BuildOptimizer | None = None) -> Optimizer:
    """Build AdamW over the trainable parameters, grouped by weight decay, or let `build` make another optimizer.

    Only matrices decay: biases, norms and magnitudes have no reason to be near 0.
    """
    trained = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if build is None:
        groups: dict[float, list[nn.Parameter]] = {}
        for parameter in trained:
            groups.setdefault(config.weight_decay if parameter.dim() > 1 else 0.0, []).append(parameter)
        rate = config.learning_rate
        return adamw({"params": own, "weight_decay": decay, "lr": rate} for decay, own in groups.items())
    optimizer = build([*trained])
    if differing := [trained.get(p, "what is not trainable") for p in trained.keys() ^ {*parameters_of(optimizer)}]:
        raise TrainingError(f"the optimizer must have exactly the trainable parameters; differing: {differing[:5]}")
    for name, key in (("learning_rate", "lr"), ("weight_decay", "weight_decay")):
        if getattr(config, name) not in (getattr(TrainConfig, name), *(g.get(key) for g in optimizer.param_groups)):
            raise TrainingError(f"{name} is AdamW's: set it in your own optimizer instead")
    return optimizer


def warmup_steps(config: TrainConfig, total: int) -> int:
    """Return in how many of the steps of a run the learning rate rises."""
    share = config.warmup_steps
    return math.ceil(round(share * total, 9)) if share < 1 else int(share)  # 0.07 * 100 is a little more than 7


def _step(
    model: nn.Module,
    optimizer: Optimizer,
    batches: Sequence[sampler.MicroBatch],
    loss: LossOfRows,
    adapters: Mapping[str, LoraAdapter],
    config: TrainConfig,
    done: int,
) -> Record:
    """Make one optimizer step as `training.train_step`, after `done` others, with all ranks; return its record."""
    device = next(model.parameters()).device
    measured: list[Metrics] = []

    def seeded_loss(model: nn.Module, batch: sampler.MicroBatch) -> tuple[Tensor, int]:
        sampler.seed_random_state(device, f"{config.seed}/{batch.number}")
        sampler.seed_dropout(adapters, config.seed, batch.number)
        part, count, metrics = loss(model, batch.rows, step=done + 1)
        measured.append(metrics if batch.is_counted else {})
        return (part, count) if batch.is_counted else (0 * part, 0)

    with sampler.kept_random_state(device):  # backward may draw as well
        total, count = accumulate(model, optimizer, batches, seeded_loss)
    processes.all_reduce_([*(p.grad for p in model.parameters() if p.grad is not None), total])
    tokens = sum(len(getattr(row, "tokens", ())) for batch in batches if batch.is_counted for row in batch.rows)
    count, tokens = map(sum, zip(*processes.all_gather((count, tokens)), strict=True))
    with sampler.kept_random_state(device, f"{config.seed}/step {done}"):  # the optimizer may draw
        step = update(optimizer, total, count, config.max_grad_norm)
    return {
        "step": done + 1,
        "loss": step.loss,
        "learning_rate": optimizer.param_groups[0]["lr"],
        "grad_norm": step.grad_norm,
        "tokens": tokens or count,
        "peak_memory_bytes": peak_memory_bytes(total.device),
        **means(chain(*processes.all_gather(as_numbers(measured)))),
    }


def _evaluate(
    model: nn.Module, loss: Callable[[Any, Any], Any], held_out: Sequence[Any], config: TrainConfig, is_text: bool
) -> dict[str, float]:
    """Return the loss and the metrics of held-out rows by their names in a record."""
    sizes = [len(row.tokens) for row in held_out] if is_text else [1] * len(held_out)
    groups = sampler.eval_groups(sizes, None if is_text else config.batch_size)
    return {f"eval_{name}": value for name, value in mean_loss(model, loss, held_out, groups, seed=config.seed).items()}


def _not_finite(record: Record, dataset: Sequence[Any], step: sampler.StepRows) -> TrainingError:
    """Return the error of a step whose loss or gradient is not finite."""
    sources = ", ".join(str(getattr(dataset[row], "source", row)) for rows in step for row in rows)
    return TrainingError(
        f"step {record['step']}: loss {record['loss']}, gradient norm {record['grad_norm']}; rows: {sources}. The "
        "weights are as they were before the step; a lower learning rate or float32 may help"
    )


def _resume(
    model: nn.Module, optimizer: Optimizer, run: dict[str, Any], total: int, folder: Path | None, limit: int
) -> tuple[checkpoints.State, dict[str, Tensor], tuple[str, ...]]:
    """Restore the newest checkpoint, if any; return the state, the best weights, and what is wrong with newer ones."""
    state = checkpoints.State({**run, "steps": total})
    if folder is None:
        return state, {}, ()
    state.start = checkpoints.start_numbers(model, dict(model.named_parameters()))
    newest, damaged = processes.run_on_rank0(checkpoints.newest_checkpoint, folder)
    if newest is None:
        return state, {}, damaged
    state, best = checkpoints.load_checkpoint(newest, model, optimizer, state)
    processes.run_on_rank0(checkpoints.prune, folder, state.step, limit)  # a crash may have left some
    return state, best, damaged
