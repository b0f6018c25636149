"""Exercise 3: a recipe with four silent mistakes. For the verdict: python tutorials/exercises/check.py 03"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

raise NotImplementedError  # delete this line, and repair the four functions below, which are in order of difficulty


def step_loss(parts: list[tuple[Tensor, int]]) -> Tensor:
    """Return the loss of one step from its micro-batches, each (the sum of -log p, the number of its labels)."""
    return sum(total / count for total, count in parts) / len(parts)


def collate(rows: list[tuple[list[int], list[int]]], pad: int) -> tuple[Tensor, Tensor]:
    """Pad rows of tokens and labels. Return the tokens, and at each position the label of the token after it.

    Shapes: -> (B, T), (B, T)
    """
    width = max(len(tokens) for tokens, _ in rows)
    input_ids = torch.tensor([tokens + [pad] * (width - len(tokens)) for tokens, _ in rows])
    targets = torch.tensor([labels[1:] + [pad] * (width - len(labels) + 1) for _, labels in rows])
    targets[targets == pad] = -100
    return input_ids, targets


def token_loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, int]:
    """Return the sum of -log p over the labels of a batch that `collate` made, and their number.

    Shapes: logits (B, T, V), targets (B, T) -> (), ()
    """
    logits, targets = logits[:, :-1], targets[:, 1:]
    total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    return total, int((targets != -100).sum())


def split_row(prompt: str, completion: str, tokenizer: Any) -> tuple[str, str]:
    """Return a prompt and a completion of the same text, so that the prompt's own tokens begin the tokens of the row.

    Of all such prompts it is the longest that is no longer than the given one.
    """
    return prompt.rstrip(), " " + completion.lstrip()
