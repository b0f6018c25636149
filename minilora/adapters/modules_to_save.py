"""Parts of a model that an adapter trains in full: modules (`modules_to_save`), biases, rows of an embedding.

Each adapter has its own copy; the base stays unchanged and is used where no adapter is active.

Rows (`trainable_token_indices`), such as those of new tokens, are kept apart, so that the vocabulary is neither copied
nor given a gradient. An output head that is tied to the embedding computes the logits of these tokens with the same
rows, unless rows of its own are asked for.
"""

from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from minilora.adapter import own_parameters
from minilora.adapters.layers import embedding_scale, shallow_copy
from minilora.lora import AdapterWrapper


class TrainedCopy(nn.Module):
    """A copy of a module for one adapter, which trains its own parameters of it and shares the others (final)."""

    def __init__(self, base: nn.Module, tensors: Mapping[str, Tensor]):
        super().__init__()
        self.copy: Any = shallow_copy(base, tensors)
        self.own = {*tensors}
        # FSDP replaces parameters by plain tensors while it computes, so they are looked up by their names.
        self.shared = {key for key, _ in base.named_parameters()} - self.own

    def tensors(self) -> dict[str, Tensor]:
        return {key: parameter for key, parameter in self.copy.named_parameters() if key in self.own}

    def replaced(self) -> set[str]:
        return self.own


class ModulesToSave(AdapterWrapper):
    """A module with a trained copy for each adapter, which replaces it (final).

    A copy shares with the base the parameters that are not trained, which are looked up there in each call, because
    those of a base that is divided among ranks are whole only meanwhile.
    """

    def __getattr__(self, name: str) -> Any:
        """Forward unknown attributes to the module that acts."""
        is_own = name.startswith("__") or name in self._modules or hasattr(type(self), name)
        if self.__dict__.get("active") and not is_own:
            return getattr(self.active_adapters()[-1].copy, name)
        return super().__getattr__(name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the active copy, or the base."""
        if not self.active:
            return self.base(*args, **kwargs)
        (adapter,) = self.active_adapters()
        shared = {key: attrgetter(key)(self.base) for key in adapter.shared}
        return functional_call(adapter.copy, shared | self._in_dtype_of_base(adapter), args, kwargs)

    def merged(self) -> nn.Module:
        (adapter,) = self.active_adapters()
        return shallow_copy(self.base, self._in_dtype_of_base(adapter))

    def _in_dtype_of_base(self, adapter: TrainedCopy) -> dict[str, Tensor]:
        return {key: tensor.to(attrgetter(key)(self.base).dtype) for key, tensor in adapter.tensors().items()}


def unties(layers: Iterable[AdapterWrapper | None]) -> bool:
    """Return whether merging makes different weights of modules that share one; None is a module without adapters."""
    acting = [[p for name in layer.active for p in own_parameters(layer, name)] if layer else [] for layer in layers]
    return len({tuple(map(id, parameters)) for parameters in acting}) > 1


class TokenRows(nn.Module):
    """The trained rows of one adapter, and the tokens that they belong to (final).

    `is_shared` says that the rows are those of an embedding that the module is tied to, which are saved there.

    Shapes: ids (n), rows (n, D)
    """

    ids: Tensor

    def __init__(self, ids: Sequence[int], rows: nn.Parameter, is_shared: bool = False):
        super().__init__()
        self.rows, self.is_shared = rows, is_shared
        self.register_buffer("ids", torch.tensor(ids, device="cpu"), persistent=False)

    def tensors(self) -> dict[str, Tensor]:
        return {} if self.is_shared else {"rows": self.rows}

    def replaced(self) -> set[str]:
        return {f"row {token}" for token in self.ids.tolist()}


class TrainableTokens(AdapterWrapper):
    """An embedding or an output head in whose weight each adapter replaces some rows (final)."""

    PEFT_NAMES: ClassVar = {"rows": "token_adapter.trainable_tokens_delta"}

    def forward(self, x: Tensor) -> Tensor:
        """Map indices (...) -> (..., D) as an embedding, or (..., D) -> (..., V) as a head."""
        y: Tensor = self.base(x)
        for adapter in self.active_adapters():
            if isinstance(self.base, nn.Linear):
                bias = None if self.base.bias is None else self.base.bias[adapter.ids].to(x.dtype)
                y = y.index_copy(-1, adapter.ids, F.linear(x, adapter.rows.to(x.dtype), bias))
            else:
                is_same = x.unsqueeze(-1) == adapter.ids
                rows = F.embedding(is_same.long().argmax(-1), adapter.rows).to(y.dtype)
                rows = rows * embedding_scale(self.base, y.dtype)
                y = torch.where(is_same.any(-1, keepdim=True), rows, y)
        return y

    @property
    def weight(self) -> Tensor:
        """The base's weight with the rows of the active adapters in it."""
        weight: Tensor = self.base.weight
        for adapter in self.active_adapters():
            weight = weight.index_copy(0, adapter.ids, adapter.rows.to(weight.dtype))
        return weight

    def merged(self) -> nn.Module:
        return shallow_copy(self.base, {"weight": self.weight})
