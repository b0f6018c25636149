"""Parts of a model that an adapter trains in full: modules (`modules_to_save`), biases, rows of an embedding.

Each adapter has its own copy; the base stays unchanged and is used where no adapter is active.

Rows (`trainable_token_indices`), such as those of new tokens, are kept apart, so that the vocabulary is neither copied
nor given a gradient. An output head that is tied to the embedding computes the logits of these tokens with the same
rows, unless rows of its own are asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from minilora.adapter import add_adapter, own_parameters
from minilora.adapters.layers import embedding_scale, shallow_copy
from minilora.lora import AdapterWrapper


class ModulesToSave(AdapterWrapper):
    """A module with a trained copy for each adapter, which replaces it (final).

    A copy shares with the base the parameters that are not trained, which are looked up there in each call, because
    those of a base that is divided among ranks are whole only meanwhile.
    """

    def __init__(self, base: nn.Module, path: str):
        super().__init__(base, path)
        # FSDP replaces parameters by plain tensors meanwhile, so they are looked up by their names.
        self._names = {key for key, _ in base.named_parameters()}
        self.own: dict[str, set[str]] = {}  # of these, those that each adapter trains
        self.tied: set[str] = set()  # the adapters whose weight is that of another wrapper

    def add_copy(self, name: str, tensors: Mapping[str, Tensor], owner: AdapterWrapper | None) -> None:
        """Add an adapter that trains these parameters; its weight is that of the owner, if it is tied to one."""
        self.own[name] = {*tensors}
        copy: Any = shallow_copy(self.base, tensors)
        self.tied.discard(name)
        if owner is not None:
            copy.weight = owner.adapters[name].weight
            self.tied.add(name)
        add_adapter(self, name, copy)

    def is_whole(self, name: str) -> bool:
        """Return whether an adapter trains the module in full, not only its bias."""
        return self.own[name] != {"bias"}

    def __getattr__(self, name: str) -> Any:
        """Forward unknown attributes to the module that acts."""
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            if name in ("base", "adapters", "active") or name.startswith("__"):
                raise
            return getattr(self.adapters[self.active[-1]] if self.active else self.base, name)

    def peft_tensors(self, name: str) -> dict[str, Tensor]:
        own = {key: p for key, p in self.adapters[name].named_parameters() if key in self.own[name]}
        return own | ({"weight": own["weight"].detach().clone()} if name in self.tied else {})  # files share no memory

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the active copy, or the base."""
        if not self.active:
            return self.base(*args, **kwargs)
        name, base = self.active[-1], self.base
        shared = {key: attrgetter(key)(base) for key in self._names - self.own[name]}
        return functional_call(self.adapters[name], shared | self._in_dtype_of_base(name), args, kwargs)

    def merged(self) -> nn.Module:
        return shallow_copy(self.base, self._in_dtype_of_base(self.active[-1]))

    def _in_dtype_of_base(self, name: str) -> dict[str, Tensor]:
        base, copy = self.base, self.adapters[name]
        return {key: attrgetter(key)(copy).to(attrgetter(key)(base).dtype) for key in self.own[name]}


def unties(layers: Iterable[AdapterWrapper | None]) -> bool:
    """Return whether merging makes different weights of modules that share one; None is a module without adapters."""
    acting = [[p for name in layer.active for p in own_parameters(layer, name)] if layer else [] for layer in layers]
    return len({tuple(map(id, parameters)) for parameters in acting}) > 1


class Rows(nn.Module):
    """The trained rows of one adapter, and the tokens that they belong to.

    Shapes: ids (n), rows (n, D)
    """

    ids: Tensor

    def __init__(self, ids: Sequence[int], rows: Tensor):
        super().__init__()
        self.rows = nn.Parameter(rows)
        self.register_buffer("ids", torch.tensor(ids), persistent=False)

    def of(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return which tokens have a row, and the index of the row: (...) -> (...), (...)."""
        is_same = tokens.unsqueeze(-1) == self.ids
        return is_same.any(-1), is_same.long().argmax(-1)


class TrainableTokens(AdapterWrapper):
    """An embedding or an output head in whose weight each adapter replaces some rows (final)."""

    def __init__(self, base: nn.Module, path: str):
        super().__init__(base, path)
        self.shared: set[str] = set()  # the adapters whose rows belong to another wrapper

    def add_rows(self, name: str, tensors: Mapping[str, Tensor], owner: AdapterWrapper | None) -> None:
        """Add rows of its own, or those of the embedding that the module is tied to."""
        if owner is None:
            self.shared.discard(name)
            add_adapter(self, name, Rows(tensors["ids"].tolist(), tensors["rows"]))
        else:
            self.shared.add(name)
            add_adapter(self, name, owner.adapters[name])

    def peft_tensors(self, name: str) -> dict[str, Tensor]:
        return {} if name in self.shared else {"token_adapter.trainable_tokens_delta": self.adapters[name].rows}

    def forward(self, x: Tensor) -> Tensor:
        """Map indices (...) -> (..., D) as an embedding, or (..., D) -> (..., V) as a head."""
        y: Tensor = self.base(x)
        for adapter in (self.adapters[name] for name in self.active):
            if isinstance(self.base, nn.Linear):
                bias = None if self.base.bias is None else self.base.bias[adapter.ids].to(x.dtype)
                y = y.index_copy(-1, adapter.ids, F.linear(x, adapter.rows.to(x.dtype), bias))
            else:
                has_row, row = adapter.of(x)
                rows = F.embedding(row, adapter.rows).to(y.dtype) * embedding_scale(self.base, y.dtype)
                y = torch.where(has_row.unsqueeze(-1), rows, y)
        return y

    @property
    def weight(self) -> Tensor:
        """The base's weight with the rows of the active adapters in it."""
        weight: Tensor = self.base.weight
        for adapter in (self.adapters[name] for name in self.active):
            weight = weight.index_copy(0, adapter.ids, adapter.rows.to(weight.dtype))
        return weight

    def merged(self) -> nn.Module:
        return shallow_copy(self.base, {"weight": self.weight})
