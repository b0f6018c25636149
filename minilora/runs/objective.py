"""The training objective, Σ of losses / their number over all rows of a step; the optimizer and its rates.

The default is the loss of tokens, for the decoders of this package. A loss that is given is a function of any module
and of a list of rows of any kind.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minilora.data import IGNORE_INDEX, Example, collate
from minilora.errors import DataError, TrainingError
from minilora.llama import Decoder
from minilora.runs.sampler import Rows
from minilora.runs.settings import TrainConfig
from minilora.training import Loss, adamw, token_loss

EVAL_TOKENS = 4096  # of a forward pass of an evaluation


@dataclass(frozen=True)
class Objective:
    """A loss as a sum and a count: the loss of tokens, or `loss`, a function of any model and any rows."""

    config: TrainConfig
    loss: Loss | None = None

    def __call__(self, model: Any, rows: list[Any]) -> tuple[Tensor, int]:
        """Return the sum of the losses of some rows, and how many there are."""
        if self.loss is None:
            batch = collate(rows, next(model.parameters()).device)
            return token_loss(model, batch, self.config.gradient_checkpointing)  # type: ignore[arg-type]
        found = self.loss(model, rows)
        is_pair = isinstance(found, tuple | list) and len(found) == 2 and isinstance(found[0], Tensor)
        if not is_pair or found[0].numel() != 1 or not _is_count(found[1]):
            raise TrainingError(
                f"loss has to give (sum, count), a tensor of one number and a whole number, found {found!r:.80}"
            )
        if torch.is_grad_enabled() and not found[0].requires_grad:
            raise TrainingError("loss has to give a sum with a gradient; this one depends on nothing that is trained")
        return found[0], int(found[1])

    def eval_batches(self, dataset: Sequence[Any]) -> Iterator[Rows]:
        """Yield the rows of each forward pass of an evaluation."""
        if self.loss is None:
            return eval_groups(dataset)
        rows, size = range(len(dataset)), self.config.batch_size
        return (list(rows[begin : begin + size]) for begin in rows[::size])


def check_token_loss(model: nn.Module, dataset: Sequence[Example], held_out: Sequence[Example] = ()) -> None:
    """Check that the loss of tokens can be computed: with the model, and of every example."""
    if not isinstance(getattr(model, "model", None), Decoder):
        raise TrainingError(
            f"{type(model).__name__}: the loss of tokens needs a minilora decoder as `model.model`; "
            "give loss=, a function (model, rows) -> (sum, count)"
        )
    check_examples(model, [*dataset, *held_out])
    if blank := [example.source for example in dataset if not example.labelled]:
        raise DataError(f"{len(blank)} of {len(dataset)} examples have no label, the first is {blank[0]!r}")


def check_examples(model: Any, examples: Sequence[Example]) -> None:
    """Raise a `DataError` if a row is no example, has not a label for each token, or a token that the model has not.

    A wrong number of labels would shift those of the examples that follow. A GPU reports an unknown token without its
    place.
    """
    size = model.model.embed_tokens.num_embeddings
    for example in examples:
        if not isinstance(example, Example):
            raise DataError(f"found the row {example!r:.60}, need an ml.Example, as load_dataset makes them, or loss=")
        T = len(example.tokens)
        found = len(example.labels)
        if found != T:
            raise DataError(f"{example.source!r} has {found} labels for {T} tokens; need one for each")
        learned = [label for label in example.labels if label != IGNORE_INDEX]
        if wrong := [token for token in (*example.tokens, *learned) if not 0 <= token < size]:
            raise DataError(f"{example.source!r} holds token {wrong[0]}; the model has tokens 0 to {size - 1}")


def eval_groups(examples: Iterable[Example], copies: int = 1) -> Iterator[Rows]:
    """Yield the indices of consecutive rows, with `copies` of each at most `EVAL_TOKENS`, or of one row."""
    group, size = Rows(), 0
    for row, example in enumerate(examples):
        length = copies * len(example.tokens)
        if group and size + length > EVAL_TOKENS:
            yield group
            group, size = [], 0
        group.append(row)
        size += length
    if group:
        yield group


def _is_count(value: Any) -> bool:
    is_number = isinstance(value, numbers.Real) or (isinstance(value, Tensor) and value.numel() == 1)
    return is_number and 0 <= float(value) < 2**63 and float(value) == int(value)


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Build AdamW over the trainable parameters, named, in groups of one weight decay.

    Only matrices decay: biases, norms and magnitudes have no reason to be near 0.
    """
    groups: dict[float, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(config.weight_decay if parameter.dim() > 1 else 0.0, []).append((name, parameter))
    return adamw({"params": named, "weight_decay": decay} for decay, named in groups.items())


def trained_parameters(optimizer: torch.optim.Optimizer) -> dict[str, nn.Parameter]:
    """Return the parameters of an optimizer by name."""
    pairs = (zip(group["param_names"], group["params"], strict=True) for group in optimizer.param_groups)
    return {name: parameter for group in pairs for name, parameter in group}


def warmup_steps(config: TrainConfig, total: int) -> int:
    """Return in how many of the steps of a run the learning rate rises."""
    share = config.warmup_steps
    return math.ceil(round(share * total, 9)) if share < 1 else int(share)  # 0.07 * 100 is a little more than 7
