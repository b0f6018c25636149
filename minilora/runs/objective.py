"""What a run minimises, Σ of losses / their number over all rows of a step, and at which rate each parameter learns.

The default is the loss of tokens, for the decoders of this package. Any other is a function of the model, which may
then be any module, and of a list of rows, which may then be anything.

    [LoRA+]  Hayou et al. 2024, LoRA+: Efficient Low Rank Adaptation of Large Models
"""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minilora.adapter import adapter_layers
from minilora.data import IGNORE_INDEX, Batch, Example, collate
from minilora.errors import ConfigError, DataError, TrainingError
from minilora.runs.config import TrainConfig
from minilora.runs.seeded import Rows, groups, plan_steps
from minilora.training import Loss, adamw, learning_rate, token_loss

START_ROWS = 256
EVAL_TOKENS = 4096  # tokens in a forward pass of an evaluation


class TokenLoss:
    """-log p(token | before) of the labelled tokens of `Example`s: the loss of the decoders of this package."""

    def __init__(self, config: TrainConfig):
        self.config = config

    def batch(self, rows: list[Any], device: torch.device) -> Batch:
        """Lay rows end to end, on the device or on their way there."""
        return collate(rows, device)

    def __call__(self, model: Any, batch: Batch) -> tuple[Tensor, int]:
        """Return the sum of the losses of a batch, and how many those are."""
        recompute = self.config.recompute
        return token_loss(model, batch, "none" if recompute == "auto" else recompute)  # a run has chosen before

    def check(self, model: nn.Module, dataset: Sequence[Any], held_out: Sequence[Any]) -> None:
        """Refuse a model or rows that the loss is not made for.

        Raises:
            DataError, TrainingError: why.
        """
        trunk = getattr(model, "model", None)
        is_ours = isinstance(trunk, nn.Module) and "lengths" in inspect.signature(trunk.forward).parameters
        if not is_ours:
            raise TrainingError(
                f"{type(model).__name__}: the loss of tokens needs a trunk `model(tokens, lengths, recompute=…)`; "
                "give loss=, a function (model, rows) -> (sum, count)"
            )
        if uneven := [example.source for example in dataset if len(example.labels) != len(example.tokens)]:
            raise DataError(f"{len(uneven)} examples have not one label for each token, the first is {uneven[0]!r}")
        if blank := [example.source for example in dataset if not example.labelled]:
            raise DataError(f"{len(blank)} of {len(dataset)} examples have no label, the first is {blank[0]!r}")
        check_ids(model, [*dataset, *held_out])

    def tokens(self, batches: list[Batch]) -> int:
        """Count the tokens of some batches."""
        return sum(sum(batch.lengths) for batch in batches)

    def lengths(self, dataset: Sequence[Any]) -> list[int]:
        """Count the tokens of each row."""
        return [len(example.tokens) for example in dataset]

    def compilable(self, model: Any) -> list[nn.Module]:
        """Return the parts that are worth compiling: norms and MLPs.

        Attention goes through documents by their lengths, and would be compiled for each anew.
        """
        return [part for block in model.model.layers for part in block.children() if part is not block.self_attn]

    def eval_batches(self, dataset: Sequence[Any]) -> Iterator[Rows]:
        """Yield the rows of each forward pass of an evaluation."""
        return eval_groups(self.lengths(dataset))


class GivenLoss:
    """A function of any model and any rows. Its methods are those of `TokenLoss`."""

    def __init__(self, loss: Loss, config: TrainConfig):
        self.loss, self.config = loss, config

    def batch(self, rows: list[Any], device: torch.device) -> list[Any]:
        return rows

    def __call__(self, model: Any, batch: list[Any]) -> tuple[Tensor, int]:
        """What the function says.

        Raises:
            TrainingError: it is no sum with its count, or the sum has no gradient.
        """
        found = self.loss(model, batch)
        is_pair = isinstance(found, tuple | list) and len(found) == 2 and isinstance(found[0], Tensor)
        if not is_pair or found[0].numel() != 1 or not _is_count(found[1]):
            raise TrainingError(
                f"loss has to give (sum, count), a tensor of one number and a whole number, found {found!r:.80}"
            )
        if torch.is_grad_enabled() and not found[0].requires_grad:
            raise TrainingError(
                "loss has to give a sum with a gradient, found one without: nothing trained has a part in it"
            )
        return found[0], int(found[1])

    def check(self, model: nn.Module, dataset: Sequence[Any], held_out: Sequence[Any]) -> None:
        """Any will do."""

    def tokens(self, batches: list[list[Any]]) -> int | None:
        sizes = _sizes(row for batch in batches for row in batch)
        return None if sizes is None else sum(sizes)

    def lengths(self, dataset: Sequence[Any]) -> list[int]:
        if self.config.batch_tokens is None and self.config.sort_window == 1:
            return [1] * len(dataset)
        sizes = _sizes(dataset[i] for i in range(len(dataset)))
        if sizes is None:
            raise DataError("batch_tokens and sort_window count the `tokens` of rows, which not all of these have")
        return sizes

    def compilable(self, model: Any) -> list[nn.Module]:
        return [model]

    def eval_batches(self, dataset: Sequence[Any]) -> Iterator[Rows]:
        size = self.config.batch_size
        return (list(range(i, min(i + size, len(dataset)))) for i in range(0, len(dataset), size))


Objective = TokenLoss | GivenLoss


def start_losses(model: Any, dataset: Sequence[Any], config: TrainConfig) -> Iterator[Tensor]:
    """Mean losses of the first micro-batches that a run would train on, each computed when it is asked for.

    They are what start values are made of that come from the data; `START_ROWS` rows are enough to see directions.
    """
    check_ids(model, dataset)
    objective, rows = TokenLoss(config), 0
    device = next(model.parameters()).device
    for step in plan_steps(objective.lengths(dataset), config):
        for batch in step:
            if rows >= START_ROWS:
                return
            total, count = objective(model, objective.batch([dataset[row] for row in batch], device))
            yield total / count
            rows += len(batch)


def check_ids(model: Any, examples: Sequence[Example]) -> None:
    """Refuse what would end in an index out of range, on a GPU without saying where.

    Raises:
        DataError: a token that the model has not.
    """
    size = model.model.embed_tokens.num_embeddings
    for example in examples:
        learned = [label for label in example.labels if label != IGNORE_INDEX] if example.shift else []
        if wrong := [token for token in (*example.tokens, *learned) if not 0 <= token < size]:
            raise DataError(f"{example.source!r} holds token {wrong[0]}; the model has tokens 0 to {size - 1}")


def eval_groups(lengths: Sequence[int]) -> Iterator[Rows]:
    """Consecutive rows, by their numbers of tokens: so many together as one forward pass of an evaluation takes."""
    return groups(lengths, range(len(lengths)), EVAL_TOKENS)


def _is_count(value: Any) -> bool:
    is_number = isinstance(value, numbers.Real) or (isinstance(value, Tensor) and value.numel() == 1)
    return is_number and 0 <= float(value) < 2**63 and float(value) == int(value)


def _sizes(rows: Iterable[Any]) -> list[int] | None:
    """How many `tokens` each row has; None if one has no such thing."""
    sizes = []
    for row in rows:
        tokens = row.get("tokens") if isinstance(row, Mapping) else getattr(row, "tokens", None)
        if tokens is None:
            return None
        sizes.append(len(tokens))
    return sizes


EMBEDDING_RATE = 1e-6  # of the factors of an adapted embedding in LoRA+, as in PEFT


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Build AdamW over what of the model requires grad, in groups that learn alike.

    Each group has its rate as a multiple of the run's, `factor`, and the `names` of its parameters. Weight decay pulls
    on matrices alone: biases, norms and magnitudes have no reason to be near 0.

    Raises:
        ConfigError: `loraplus_lr_ratio` is given, and no factor of an adapter is trained.
    """
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, factor in rate_factors(model, config).items():
        parameter = model.get_parameter(name)
        decay = config.weight_decay if parameter.dim() > 1 else 0.0
        group = groups.setdefault((factor, decay), {"params": [], "names": []})
        group["params"].append(parameter)
        group["names"].append(name)
    return adamw({**group, "factor": key[0], "weight_decay": key[1]} for key, group in groups.items())


def trained_parameters(optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    """Return the parameters of an optimizer by name."""
    pairs = (zip(group["names"], group["params"], strict=True) for group in optimizer.param_groups)
    return {name: parameter for group in pairs for name, parameter in group}


def rate_factors(model: nn.Module, config: TrainConfig) -> dict[str, float]:
    """Return the rate of each trained parameter, as a multiple of `learning_rate`  [LoRA+ §4].

    One rate for both factors learns one of them inefficiently in wide layers, so LoRA+ gives B a higher one than A.
    With `loraplus_lr_ratio`, B and all vectors (biases, magnitudes) have that multiple; A, and what is trained beside
    adapters, have the rate itself; the factors of an adapted embedding have `EMBEDDING_RATE`.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    ratio = config.loraplus_lr_ratio
    if ratio is None:
        return dict.fromkeys(trained, 1.0)
    factors = [name for name in trained if _is_factor(name, "lora_A") or _is_factor(name, "lora_B")]
    if not factors:
        raise ConfigError("TrainConfig: loraplus_lr_ratio is for adapters, and no lora_A or lora_B is trained")
    embeddings = [f"{path}." for path, layer in adapter_layers(model).items() if isinstance(layer.base, nn.Embedding)]

    def factor(name: str, parameter: nn.Parameter) -> float:
        if name in factors and name.startswith(tuple(embeddings)):
            return EMBEDDING_RATE / config.learning_rate
        return ratio if _is_factor(name, "lora_B") or parameter.dim() == 1 else 1.0

    return {name: factor(name, parameter) for name, parameter in trained.items()}


def _is_factor(name: str, factor: str) -> bool:
    return factor in name.split(".")


def rate_of_step(step: int, total: int, config: TrainConfig) -> float:
    """Compute the learning rate of step 0 ≤ step < total; see `training.learning_rate`."""
    warmup = int(config.warmup_steps)
    if config.warmup_steps < 1:
        warmup = math.ceil(round(config.warmup_steps * total, 9))  # 0.07 * 100 is a little more than 7
    return learning_rate(step, total, config.learning_rate, warmup, config.lr_scheduler)
