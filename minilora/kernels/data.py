"""A batch that travels to a GPU while the processor goes on."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from minilora import data
from minilora.data import Batch, Example
from minilora.definition import kernel


@kernel(of=data.collate)
def collate(examples: Iterable[Example], device: torch.device) -> Batch:
    """Build the tensors in pinned memory, from where they are copied asynchronously."""
    if device.type != "cuda":
        return data.collate.function(examples, device)
    batch = data.collate.function(examples, torch.device("cpu"))
    tensors = (batch.tokens, batch.label_positions, batch.labels)
    tokens, positions, labels = (tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors)
    return Batch(tokens, batch.lengths, positions, labels)
