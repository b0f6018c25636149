"""What a run minimises: Σ of losses / their number, over all rows of a step.

The default is the loss of tokens, for the decoders of this package. Any other is a function of the model, which may
then be any module, and of a list of rows, which may then be anything.
"""

from __future__ import annotations

import inspect
import numbers
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minilora.errors import DataError, TrainingError
from minilora.models import ops
from minilora.models.ops import IGNORE_INDEX
from minilora.runs.batch import Batch, Rows, collate, groups, plan_steps
from minilora.runs.config import TrainConfig
from minilora.runs.data import Example

Loss = Callable[[Any, list[Any]], tuple[Tensor, Any]]  # (model, rows) -> sum of their losses, and how many those are
START_ROWS = 256
EVAL_TOKENS = 4096  # tokens in a forward pass of an evaluation


class Objective(ABC):
    """A loss, and what a run has to know of its rows (abstract).

    Attributes:
        may_cast: are adapters cast once a step? A loss that changes A or B meanwhile would not see it.
    """

    may_cast: bool

    @abstractmethod
    def batch(self, rows: list[Any], device: torch.device) -> Any:
        """Some rows as the loss takes them, on the device, or on their way there."""

    @abstractmethod
    def __call__(self, model: Any, batch: Any) -> tuple[Tensor, int]:
        """The sum of the losses of a batch, and how many those are."""

    @abstractmethod
    def check(self, model: nn.Module, dataset: Sequence[Any], held_out: Sequence[Any]) -> None:
        """Refuse a model or rows that it is not made for.

        Raises:
            DataError, TrainingError: why.
        """

    @abstractmethod
    def known_count(self, batches: list[Any]) -> int | None:
        """How many losses the batches have, if that is known before they are computed."""

    @abstractmethod
    def tokens(self, batches: list[Any]) -> int | None:
        """How many there are in the batches, or None if that is not known."""

    @abstractmethod
    def lengths(self, dataset: Sequence[Any]) -> list[int]:
        """Tokens of each row, or 1, if nothing depends on them.

        Raises:
            DataError: something does, and not all rows say how many they have.
        """

    @abstractmethod
    def compilable(self, model: Any) -> list[nn.Module]:
        """The parts of the model that are worth to be compiled."""

    @abstractmethod
    def evaluated_together(self, dataset: Sequence[Any]) -> Iterator[Rows]:
        """The rows of each forward pass of an evaluation."""


class TokenLoss(Objective):
    """-log p(token | before) of the labelled tokens of `Example`s (final)."""

    may_cast = True

    def __init__(self, config: TrainConfig):
        self.config = config

    def batch(self, rows: list[Any], device: torch.device) -> Batch:
        return collate(rows, device)

    def __call__(self, model: Any, batch: Batch) -> tuple[Tensor, int]:
        return batch_loss(model, batch, self.config), batch.labelled

    def check(self, model: nn.Module, dataset: Sequence[Any], held_out: Sequence[Any]) -> None:
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

    def known_count(self, batches: list[Batch]) -> int:
        return sum(batch.labelled for batch in batches)

    def tokens(self, batches: list[Batch]) -> int:
        return sum(sum(batch.lengths) for batch in batches)

    def lengths(self, dataset: Sequence[Any]) -> list[int]:
        return [len(example.tokens) for example in dataset]

    def compilable(self, model: Any) -> list[nn.Module]:
        """Norms and MLPs. Attention goes through documents by their lengths, and would be compiled for each anew."""
        return [part for block in model.model.layers for part in block.children() if part is not block.self_attn]

    def evaluated_together(self, dataset: Sequence[Any]) -> Iterator[Rows]:
        return groups_to_evaluate(self.lengths(dataset))


class GivenLoss(Objective):
    """A function of any model and any rows (final)."""

    may_cast = False

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

    def known_count(self, batches: list[Any]) -> None:
        return None

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

    def evaluated_together(self, dataset: Sequence[Any]) -> Iterator[Rows]:
        size = self.config.batch_size
        return (list(range(i, min(i + size, len(dataset)))) for i in range(0, len(dataset), size))


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


def groups_to_evaluate(lengths: Sequence[int]) -> Iterator[Rows]:
    """Consecutive rows, by their numbers of tokens: so many together as one forward pass of an evaluation takes."""
    return groups(lengths, range(len(lengths)), EVAL_TOKENS)


def batch_loss(model: Any, batch: Batch, config: TrainConfig) -> Tensor:
    """The sum of the losses of a batch's labelled tokens."""
    recompute = "none" if config.recompute == "auto" else config.recompute  # a run has chosen before it comes here
    hidden = model.model(batch.tokens, batch.lengths, recompute=recompute)
    hidden, labels = hidden.index_select(0, batch.places), batch.targets.index_select(0, batch.places)
    return ops.labelled_cross_entropy(hidden, labels, model.get_output_embeddings())


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
