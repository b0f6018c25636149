"""An adapter of its own for each row of a batch: all rows go through W at once, as in a server of many adapters.

    y_i = W x_i + b + s·B A x_i        with A, B and s of the adapter of row i        [Punica]

PEFT has this as the argument `adapter_names` of a model's forward.

    [Punica]  Chen et al. 2023, Punica: Multi-Tenant LoRA Serving

    with adapter_per_row(model, ["one", None, "two"]):  # None is the base alone
        ml.generate(model, [first, second, third], max_new_tokens=64)
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import minilora as ml
from minilora.adapter import adapter_layers, require_layers
from minilora.llama import Decoder
from minilora.lora import LoraAdapter, LoraLinear, lora_update


@contextmanager
def adapter_per_row(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Apply its own adapter to each row of a batch inside the block.

    Raises:
        TargetError: no adapter has such a name, or an adapter is more than A and B of linear layers.
        ShapeError: in a call, the batch has another number of rows.
    """
    require_layers(model, *(name for name in names if name is not None))
    layers = adapter_layers(model)
    for path, layer in layers.items():
        for name in set(names) & layer.adapters.keys():
            if type(layer) is not LoraLinear or not is_plain(layer.adapters[name]):
                raise ml.TargetError(f"{path}: adapter {name!r} is not a plain LoRA of a linear layer")
    rows = Rows(names)
    hooks = [layer.register_forward_hook(rows.add_updates) for layer in layers.values()]
    hooks += [each.register_forward_pre_hook(rows.read) for each in model.modules() if isinstance(each, Decoder)]
    try:
        with ml.disable_adapter(model):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def is_plain(adapter: Any) -> bool:
    """Return whether an adapter adds s·B A x and nothing else."""
    return type(adapter) is LoraAdapter and adapter.magnitude is adapter.bias is adapter.lora_bias is None


class Rows:
    """The rows of a batch, their adapters, and which of a layer's inputs belong to each of them."""

    def __init__(self, names: Sequence[str | None]):
        self.names = names
        self.lengths = [1] * len(names)  # most models keep the rows apart, in a tensor's first dimension

    def read(self, _: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Note the lengths of the rows, which minilora's decoder lays end to end: (tokens, documents, …)."""
        self.lengths = [len(span) for span in inputs[1].spans]
        if len(self.lengths) != len(self.names):
            raise ml.ShapeError(f"a batch of {len(self.lengths)} rows, for which {len(self.names)} adapters are named")

    def owners(self, count: int) -> Tensor:
        """Return the row of the batch that each of a layer's inputs belongs to."""
        last = [min(length, 1) for length in self.lengths]  # where text is generated, the head gets the last tokens
        for lengths in (self.lengths, last):
            if sum(lengths) == count:
                return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        raise ml.ShapeError(f"a layer got {count} rows in a batch of {len(self.names)}")

    def add_updates(self, layer: Any, inputs: tuple[Tensor], y: Tensor) -> Tensor:
        """Add the update of each adapter to the outputs of its rows."""
        (x,) = inputs
        owners = self.owners(len(x))
        for name in {*self.names} & layer.adapters.keys():
            mine = torch.tensor([each == name for each in self.names])[owners].nonzero().flatten().to(x.device)
            adapter = layer.adapters[name]
            update = lora_update(x[mine].to(y.dtype), adapter.lora_A, adapter.lora_B, adapter.scale)
            y = y.index_add(0, mine, update)
        return y
