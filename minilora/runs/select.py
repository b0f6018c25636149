"""Which weights are the result: the last, or the best of those that were evaluated; and when to stop looking."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from minilora.errors import FormatError
from minilora.runs.checkpoints import changing
from minilora.runs.config import TrainConfig


class Selection:
    """The evaluations of a run so far.

    Attributes:
        best_step, best_loss: of the lowest loss; 0 and None before the first evaluation.
        stale: evaluations since then.
        tensors: what training had made of the model then (see `state.changing`); empty with `keep="last"`.
    """

    def __init__(self, config: TrainConfig):
        self.config = config
        self.best_step, self.stale = 0, 0
        self.best_loss: float | None = None
        self.tensors: dict[str, Tensor] = {}

    @property
    def has_ended(self) -> bool:
        """Has the loss not fallen for `early_stopping` evaluations?"""
        return self.config.early_stopping is not None and self.stale >= self.config.early_stopping

    def note(self, model: nn.Module, step: int, loss: float) -> None:
        """Take in an evaluation. A loss that is not finite is never the best."""
        if loss < (float("inf") if self.best_loss is None else self.best_loss):
            self.best_step, self.best_loss, self.stale = step, loss, 0
            if self.config.keep == "best":
                self.tensors = {name: tensor.detach().clone() for name, tensor in changing(model).items()}
        else:
            self.stale += 1

    def restore(self, model: nn.Module) -> None:
        """Put the best weights into the model, if they are wanted."""
        now = changing(model)
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                now[name].copy_(tensor)

    def state(self) -> dict[str, Any]:
        """What a checkpoint says of it, beside the tensors."""
        return {"best_step": self.best_step, "best_loss": self.best_loss, "stale": self.stale}

    def resume(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Go on from a checkpoint.

        Raises:
            FormatError: it lacks something.
        """
        self.best_step, self.best_loss, self.stale = state["best_step"], state["best_loss"], state["stale"]
        self.tensors = tensors
        if self.config.keep == "best" and self.best_step and not tensors:
            raise FormatError(f"the checkpoint lacks best.safetensors, the weights of step {self.best_step}")
