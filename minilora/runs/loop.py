"""Training: what happens around the step of `minilora.training`: the plan, evaluation, checkpoints, records."""

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
from torch.utils._pytree import tree_leaves

from minilora.adapters.config import LoraConfig
from minilora.adapters.find import base_held
from minilora.errors import DataError, FormatError, TrainingError, check_types
from minilora.llama import Llama, Recompute
from minilora.models.bitsandbytes import QuantizeConfig
from minilora.models.classifier import Classifier
from minilora.runs.checkpoints import (
    Selection,
    checkpoints,
    fingerprint,
    load_checkpoint,
    newest_step,
    save_checkpoint,
    trained_adapters,
)
from minilora.runs.config import TrainConfig
from minilora.runs.evaluate import mean_loss
from minilora.runs.machine import kept_memory, peak_memory_bytes, release_memory
from minilora.runs.memory import Plan, fit
from minilora.runs.objective import (
    GivenLoss,
    Objective,
    TokenLoss,
    build_optimizer,
    rate_of_step,
    trained_parameters,
)
from minilora.runs.seeded import Rows, plan_steps, set_dropout_step
from minilora.storage import read_json
from minilora.training import Loss, total_norm, train_step

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
    check_types(train, locals())
    if not torch.is_grad_enabled():
        raise TrainingError("there are no gradients within no_grad or inference_mode")
    config = config or TrainConfig()
    objective: Objective = TokenLoss(config) if loss is None else GivenLoss(loss, config)
    adapters = trained_adapters(model)
    if not len(dataset):
        raise DataError("there are no examples to learn from")
    objective.check(model, dataset, held_out)
    if config.selects and not len(held_out):
        raise DataError("keep best and early_stopping need held-out examples")
    if config.recompute == "auto":
        lora = next(iter(adapters.values()), None)
        way = _fitting_recompute(model, dataset, held_out, config, lora) if loss is None else "none"
        config = objective.config = replace(config, recompute=way)  # a given loss recomputes what it likes
    steps = plan_steps(objective.lengths(dataset), config)
    state: Record = {"step": 0, "tokens": 0, "seconds": 0.0}
    if checkpoint_dir is not None:
        checkpoint_dir = Path(checkpoint_dir)
        state["run"] = fingerprint(dataset, held_out if config.selects else (), config, adapters)
    run = _Run(model, build_optimizer(model, config), objective, dataset, steps, config)
    try:
        with _compiled(objective.compilable(model) if config.compile else []):
            return _train(run, state, on_step or (lambda record: None), held_out, checkpoint_dir)
    finally:
        for parameter in trained_parameters(run.optimizer).values():
            parameter.grad = None
        set_dropout_step(model, None)


def _fitting_recompute(
    model: Any, dataset: Sequence[Any], held_out: Sequence[Any], config: TrainConfig, lora: LoraConfig | None
) -> Recompute:
    """Choose for `auto` what fits beside the loaded model.

    Raises:
        TrainingError: the model is none of minilora's decoders, whose memory alone is forecast.
    """
    if not isinstance(model, Llama | Classifier):
        raise TrainingError(f"{type(model).__name__}: recompute 'auto' is for minilora's own decoders; name a way")
    weight = model.model.embed_tokens.weight
    plan = Plan(
        model.config,
        lora,
        config,
        QuantizeConfig("none" if base_held(model)["quantize"] == "none" else "nf4"),
        weight.dtype,
        weight.device,
        [(len(example.tokens), example.labelled) for example in dataset],
        [[len(example.tokens) for example in held_out]],
        len(model.labels) if isinstance(model, Classifier) else 0,
    )
    chosen = fit(plan, held=sum(p.nbytes for p in model.parameters()))[0].training.recompute
    assert chosen != "auto"
    return chosen


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


def _train(run: _Run, state: Record, on_step: OnStep, held_out: Sequence[Any], folder: Path | None) -> TrainResult:
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
        stopped = bool(on_step({**record, **pace}))
        step, is_last = state["step"], state["step"] == len(steps)
        if len(held_out) and config.eval_steps and (is_last or _is_due(config.eval_steps, step)):
            eval_loss = mean_loss(model, run.objective, held_out)
            selection.note(model, step, eval_loss)
            stopped |= bool(on_step({"step": step, "eval_loss": eval_loss, "best_step": selection.best_step}))
        is_last |= selection.has_ended  # what comes after training may fail, and must not cost the run
        if folder is not None and (stopped or is_last or _is_due(config.save_steps, step)):
            saved, best = {**state, **selection.state()}, selection.tensors
            save_checkpoint(folder, model, run.optimizer, saved, best, config.save_total_limit)
    model.eval()
    finished, kept = selection.has_ended or state["step"] == len(steps), state["step"]
    if finished and selection.tensors:
        selection.restore(model)
        kept = selection.best_step
    return TrainResult(state["step"], len(steps), state["tokens"], time.monotonic() - started, finished, kept)


def _step(run: _Run, step: int, batches: list[Any]) -> tuple[Record, list[Any]]:
    """Make one optimizer step; return its record, and the micro-batches of the next step.

    Until all is on its way nothing is asked of the device, whose work is only then waited for: once, for all numbers.

    Raises:
        DataError: the loss counts nothing.
        TrainingError: the loss, the gradient or a weight is not finite, or what is trained has changed.
    """
    model, config, first = run.model, run.config, step * run.config.gradient_accumulation_steps
    _check_trained(model, run.optimizer)
    rate = rate_of_step(step, len(run.steps), config)
    for group in run.optimizer.param_groups:
        group["lr"] = rate * group["factor"]
    drawn = _drawing(model, batches, config.seed, first)
    done = train_step(model, run.optimizer, drawn, run.objective, config.max_grad_norm)
    weight_norm = total_norm([p.detach() for p in trained_parameters(run.optimizer).values()])
    upcoming = run.batches(step + 1)
    *shares, grad_norm, length = torch.cat([done.losses, torch.stack([done.grad_norm, weight_norm])]).tolist()
    loss = sum(shares)
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        eager = torch.compiler.set_stance("force_eager") if config.compile else nullcontext()
        with eager:  # what is compiled has no hooks
            again = _drawing(model, batches, config.seed, first)
            where = first_bad_module(model, lambda: [run.objective(model, batch) for batch in again])
        raise TrainingError(
            f"step {step + 1}: loss {loss}, gradient norm {grad_norm}; first bad: {where}; rows: {run.sources(step)}. "
            "The weights are those of before the step; a lower learning rate or float32 may help"
        )
    if not math.isfinite(length):
        raise TrainingError(f"step {step + 1}: the weights are not finite after it; learning rate {rate} is too high")
    tokens = run.objective.tokens(batches)
    memory = peak_memory_bytes(done.grad_norm.device)
    record = {"step": step + 1, "loss": loss, "learning_rate": rate, "grad_norm": grad_norm}
    return {**record, "tokens": done.labelled if tokens is None else tokens, "peak_memory_bytes": memory}, upcoming


def _check_trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Raise a TrainingError if a parameter was frozen, thawed, or replaced by another one since the run began."""
    held = {id(p): name for name, p in trained_parameters(optimizer).items()}
    now = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    if changed := sorted({name for key, name in (held | now).items() if key not in held or key not in now}):
        raise TrainingError(
            f"{changed[:3]}: what is trained has changed since the run began; change it between two runs"
        )


def _drawing(model: nn.Module, batches: Sequence[Any], seed: int, first: int) -> Iterator[Any]:
    """Yield the micro-batches, while PyTorch's random state follows from the seed on a CPU and on CUDA.

    What a model of another library draws, such as its own dropout, then is the same in a resumed run. Afterwards the
    generators are as before.
    """
    device = next(model.parameters()).device
    for index, batch in enumerate(batches, start=first):
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            number = seed * MICRO_BATCH_SEEDS + index
            torch.default_generator.manual_seed(number)
            if device.type == "cuda":
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(number)
            set_dropout_step(model, seed, index)
            yield batch


def _resumed(folder: Path, run: _Run, selection: Selection, fresh: Record) -> Record:
    """The state that a run goes on from: that of the newest checkpoint, which is put into the model, or a fresh one."""
    found = checkpoints(folder)
    if not found:
        return fresh
    checkpoint = found[-1]
    if read_json(checkpoint / "state.json").get("run") != fresh["run"]:  # before anything is put into the model
        raise TrainingError(f"{checkpoint}: written by a run with other data or settings, so it cannot be resumed here")
    state, best = load_checkpoint(checkpoint, run.model, run.optimizer)
    if state.get("step") != newest_step(folder):
        raise FormatError(
            f"{checkpoint}: state.json says step {state.get('step')!r}; remove the directory to go on without it"
        )
    selection.resume(state, best)
    return {key: state[key] for key in fresh}


def _is_due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0


@torch.no_grad()
def first_bad_module(model: nn.Module, compute: Callable[[], Any]) -> str:
    """Run `compute` once more and name the first module whose output is not finite; else the first such gradient."""
    bad: list[str] = []

    def watch(path: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            tensors = [each for each in tree_leaves(output) if isinstance(each, Tensor) and each.is_floating_point()]
            if not all(bool(tensor.isfinite().all()) for tensor in tensors):
                bad.append(path)

        return hook

    handles = [module.register_forward_hook(watch(path)) for path, module in model.named_modules()]
    try:
        compute()
    finally:
        for handle in handles:
            handle.remove()
    if bad:
        return f"output of {bad[0]}"
    gradients = ((name, p.grad) for name, p in model.named_parameters() if p.grad is not None)
    return next((f"gradient of {name}" for name, grad in gradients if not grad.isfinite().all()), "the loss itself")
