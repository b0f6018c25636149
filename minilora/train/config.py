"""How a run goes: `TrainConfig`. Its fields are the command line's flags, their defaults and their help."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from minilora.errors import ConfigError
from minilora.model.ops import Recompute

TrainOn = Literal["completion", "assistant", "all"]
Scheduler = Literal["cosine", "linear", "constant"]
COUNTS = (
    *("batch_size", "batch_tokens", "gradient_accumulation_steps", "max_length", "max_steps"),
    *("eval_steps", "save_steps", "save_total_limit", "logging_steps"),
)


def option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class TrainConfig:
    """One training run.

    Raises:
        ConfigError: a value that cannot work; all of them in one message.
    """

    learning_rate: float = option(2e-4, "highest learning rate of AdamW")
    lr_scheduler: Scheduler = option("cosine", "how the learning rate falls after the warm-up")
    warmup_steps: float = option(0.03, "steps in which the learning rate rises; below 1: a fraction of all steps")
    batch_size: int = option(4, "rows in a micro-batch")
    batch_tokens: int | None = option(None, "fill micro-batches up to so many tokens instead of counting rows")
    gradient_accumulation_steps: int = option(1, "micro-batches in a step")
    max_length: int = option(1024, "tokens after which a row is cut")
    epochs: float = option(1.0, "how often every row is seen")
    max_steps: int | None = option(None, "stop after so many steps, whatever --epochs says")
    train_on: TrainOn = option("completion", "labels: the last answer, every assistant turn, or all tokens")
    recompute: Recompute = option("none", "compute MLPs or whole blocks again in the backward pass to save memory")
    weight_decay: float = option(0.0, "AdamW's weight decay on the adapter")
    max_grad_norm: float = option(1.0, "clip the gradient's norm to this; 0: never")
    eval_split: float = option(0.05, "share of the rows that is held out, if the data has no split of its own")
    eval_steps: int | None = option(None, "evaluate on the held-out rows every so many steps")
    save_steps: int | None = option(None, "write a checkpoint every so many steps")
    save_total_limit: int = option(2, "checkpoints to keep")
    logging_steps: int = option(1, "steps between two lines of metrics.jsonl")
    seed: int = option(0, "of the order of rows, the adapter's start and dropout")

    def __post_init__(self) -> None:
        bad = []
        for name in COUNTS:
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and value >= 1):
                bad.append(f"{name} is {value!r}, need a whole number of at least 1")
        for name in ("warmup_steps", "weight_decay", "max_grad_norm", "eval_split", "seed"):
            if not 0 <= getattr(self, name) < math.inf:
                bad.append(f"{name} is {getattr(self, name)!r}, need a finite number of at least 0")
        for name in ("learning_rate", "epochs"):
            if not 0 < getattr(self, name) < math.inf:
                bad.append(f"{name} is {getattr(self, name)!r}, need a finite number above 0")
        if self.seed >= 2**32:
            bad.append(f"seed is {self.seed!r}, need one below 2**32")
        if not self.eval_split < 1:
            bad.append(f"eval_split is {self.eval_split!r}, need a share below 1")
        for name, kind in (("lr_scheduler", Scheduler), ("train_on", TrainOn), ("recompute", Recompute)):
            if getattr(self, name) not in get_args(kind):
                bad.append(f"{name} is {getattr(self, name)!r}, accepted are {list(get_args(kind))}")
        if bad:
            raise ConfigError("TrainConfig: " + "; ".join(bad))
