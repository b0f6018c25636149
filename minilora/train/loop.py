"""The training loop: what a step is, and what happens around it.

The loss of a step is the sum over its labelled tokens divided by their number. Every micro-batch's sum is divided by
the number of the whole step before its backward pass, so any cutting of a step into micro-batches gives one gradient:

    L = 1/n Σ_t -log p(token t | before),  n = Σ over micro-batches of their labelled tokens

    [AdamW]  Loshchilov & Hutter 2017, Decoupled Weight Decay Regularization
    [SGDR]   Loshchilov & Hutter 2016, SGDR: Stochastic Gradient Descent with Warm Restarts
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from minilora.errors import DataError, FormatError, TrainingError
from minilora.lora.attach import adapter_layers, set_dropout_step
from minilora.lora.config import LoraConfig
from minilora.model import ops
from minilora.storage import read_json
from minilora.train.batch import Batch, Rows, collate, plan_steps
from minilora.train.config import TrainConfig
from minilora.train.data import Example
from minilora.train.diagnose import first_bad_module, peak_memory_bytes, release_memory
from minilora.train.evaluate import held_out_loss
from minilora.train.select import Selection
from minilora.train.state import checkpoints, load_checkpoint, newest_step, save_checkpoint, trained_adapter

if TYPE_CHECKING:
    from minilora.model.llama import Llama

Record = dict[str, Any]  # one line of metrics.jsonl
OnStep = Callable[[Record], bool | None]


@dataclass(frozen=True)
class TrainResult:
    """What a run did, earlier parts of a resumed one included.

    `finished` is false if `on_step` stopped it; `kept` is the step whose adapter the model holds now.
    """

    steps: int
    total_steps: int
    tokens: int
    seconds: float
    finished: bool
    kept: int


def train(
    model: Llama,
    dataset: Sequence[Example],
    config: TrainConfig | None = None,
    on_step: OnStep | None = None,
    held_out: Sequence[Example] = (),
    checkpoint_dir: Path | None = None,
) -> TrainResult:
    """Train the model's attached adapter.

    Args:
        model: a `Llama` (a trunk `model`, a head `lm_head`) with a trainable adapter.
        dataset: what `load_dataset` returns.
        config: how; by default `TrainConfig()`.
        on_step: called with one record after each step and each evaluation; if it returns True the run stops there,
            with a checkpoint.
        held_out: examples to evaluate every `eval_steps` and after the last step.
        checkpoint_dir: where checkpoints go. If there is one already, the run goes on from the newest, to the same
            bytes as if it had never stopped.

    Raises:
        DataError: there are no examples, one has no label, or not one for each token; there are none to choose the
            best adapter with.
        FormatError: the newest checkpoint is damaged.
        TrainingError: something other than one active adapter is trainable; a loss, gradient or weight is not finite;
            a checkpoint belongs to another run.
    """
    config = config or TrainConfig()
    name = trained_adapter(model)
    lora = next(layer.configs[name] for layer in adapter_layers(model).values() if name in layer.configs)
    _check_examples(dataset)
    if config.selects and not held_out:
        raise DataError("keep best and early_stopping need held-out examples")
    steps = plan_steps([len(example.tokens) for example in dataset], config)
    optimizer = _optimizer(model, config)
    selection = Selection(config)
    run = _fingerprint(dataset, held_out if config.selects else (), config, lora)
    state: Record = {"step": 0, "tokens": 0, "seconds": 0.0, "run": run}
    if checkpoint_dir is not None and (saved := checkpoints(checkpoint_dir)):
        state = _resumed(saved[-1], model, optimizer, selection, run)
    tell = on_step or (lambda record: None)
    started = time.monotonic() - state["seconds"]
    stopped, first = False, state["step"]
    while not (stopped or selection.has_ended or state["step"] == len(steps)):
        before = time.monotonic()
        record = _step(model, optimizer, dataset, steps[state["step"]], config, state["step"], len(steps))
        if state["step"] == first:  # what kernels prepared for themselves lies scattered between tensors that are gone
            release_memory()
        now, tokens = time.monotonic(), record["tokens"]
        state |= {"step": record["step"], "tokens": state["tokens"] + tokens, "seconds": now - started}
        stopped = bool(tell({**record, "tokens_per_second": tokens / (now - before), "total_steps": len(steps)}))
        step, is_last = state["step"], state["step"] == len(steps)
        if held_out and config.eval_steps and (is_last or _is_due(config.eval_steps, step)):
            loss = held_out_loss(model, held_out)
            selection.note(model, step, loss)
            stopped |= bool(tell({"step": step, "eval_loss": loss, "best_step": selection.best_step}))
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


def bookkeeping(config: TrainConfig) -> set[str]:
    """The settings that have no effect on the result: they may change between two starts of a run."""
    return {"save_steps", "save_total_limit", "logging_steps"} | (set() if config.selects else {"eval_steps"})


def _check_examples(dataset: Sequence[Example]) -> None:
    if not len(dataset):
        raise DataError("there are no examples to learn from")
    if uneven := [example.source for example in dataset if len(example.labels) != len(example.tokens)]:
        raise DataError(f"{len(uneven)} examples have not one label for each token, the first is {uneven[0]!r}")
    if blank := [example.source for example in dataset if not example.labelled]:
        raise DataError(f"{len(blank)} of {len(dataset)} examples have no label, the first is {blank[0]!r}")


def learning_rate(step: int, total: int, config: TrainConfig) -> float:
    """The learning rate of step 0 ≤ step < total: up linearly in the warm-up, then down to 0  [SGDR eq. 5].

    The warm-up's first step has 1/warm-up of the full rate, and the last step of all is not wasted on a rate of 0.
    """
    warmup = int(config.warmup_steps)
    if config.warmup_steps < 1:
        warmup = math.ceil(round(config.warmup_steps * total, 9))  # 0.07 * 100 is a little more than 7
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    falls = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
    return config.learning_rate * falls[config.lr_scheduler]


def _step(
    model: Llama,
    optimizer: torch.optim.Optimizer,
    dataset: Sequence[Example],
    micro_batches: list[Rows],
    config: TrainConfig,
    step: int,
    total: int,
) -> Record:
    """One optimizer step; the record says what it did.

    Raises:
        TrainingError: the loss or the gradient is not finite; the weights are those of before the step.
    """
    model.train()
    rate = learning_rate(step, total, config)
    batches = [collate([dataset[row] for row in rows], _device(model)) for rows in micro_batches]
    labelled = sum(dataset[row].labelled for rows in micro_batches for row in rows)
    optimizer.zero_grad(set_to_none=True)
    loss = 0.0
    for i, batch in enumerate(batches):
        set_dropout_step(model, config.seed, step * config.gradient_accumulation_steps + i)
        share = batch_loss(model, batch, config) / labelled
        share.backward()
        loss += share.item()
    parameters = [p for p in model.parameters() if p.requires_grad]
    total_norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    norm = total_norm.item()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        sources = [dataset[row].source for rows in micro_batches for row in rows]
        where = first_bad_module(model, lambda: [batch_loss(model, batch, config) for batch in batches])
        raise TrainingError(
            f"step {step + 1}: loss {loss}, gradient norm {norm}; first bad: {where}; rows: {', '.join(sources)}. "
            "The weights are those of before the step; a lower learning rate or float32 may help"
        )
    torch.nn.utils.clip_grads_with_norm_(parameters, config.max_grad_norm or math.inf, total_norm)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    if not torch.nn.utils.get_total_norm(parameters).isfinite():
        raise TrainingError(f"step {step + 1}: the weights are not finite after it; learning rate {rate} is too high")
    memory, tokens = peak_memory_bytes(_device(model)), sum(len(batch.tokens) for batch in batches)
    record = {"step": step + 1, "loss": loss, "learning_rate": rate, "grad_norm": norm}
    return {**record, "peak_memory_bytes": memory, "tokens": tokens}


def batch_loss(model: Llama, batch: Batch, config: TrainConfig) -> torch.Tensor:
    """The sum of the losses of a batch's labelled tokens."""
    hidden = model.model(batch.tokens, batch.lengths, recompute=config.recompute)
    return ops.cross_entropy(hidden, batch.targets, model.lm_head)


def _optimizer(model: Llama, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW in one fused kernel, which torch has for CPU, CUDA and MPS."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)


def _resumed(
    checkpoint: Path, model: Llama, optimizer: torch.optim.Optimizer, selection: Selection, run: str
) -> Record:
    if read_json(checkpoint / "state.json").get("run") != run:  # before anything is put into the model
        raise TrainingError(f"{checkpoint}: written by a run with other data or settings, so it cannot be resumed here")
    state, best = load_checkpoint(checkpoint, model, optimizer)
    if state.get("step") != newest_step(checkpoint.parent):
        raise FormatError(
            f"{checkpoint}: state.json says step {state.get('step')!r}; remove the directory to go on without it"
        )
    selection.resume(state, best)
    return {key: state[key] for key in ("step", "tokens", "seconds", "run")}


def _fingerprint(dataset: Sequence[Example], held_out: Sequence[Example], config: TrainConfig, lora: LoraConfig) -> str:
    """One number for everything that decides what the run computes, but for the base model."""
    settings = {key: value for key, value in asdict(config).items() if key not in bookkeeping(config)}
    digest = hashlib.sha256(json.dumps([settings, asdict(lora), len(dataset)]).encode())
    for example in [*dataset, *held_out]:
        digest.update(json.dumps([example.tokens, example.labels]).encode())
    return digest.hexdigest()


def _is_due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0


def _device(model: Llama) -> torch.device:
    return next(model.parameters()).device
