"""What an adapter trains in full: modules (`modules_to_save`), biases (`bias="all"`), rows of an embedding.

Each adapter has a copy; the base stays what it was, and acts where no adapter does.

Rows (`trainable_token_indices`), as those of new tokens, are looked up apart: the vocabulary is neither copied nor
given a gradient. If the output head is tied to the embedding, it reads the same rows, and the logits of those tokens
are made with them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from minilora.adapters.find import get_base_layer, shallow_copy
from minilora.lora import AdapterWrapper


class TrainedCopy(AdapterWrapper):
    """A module, or the active adapter's copy of it (final).

    A copy has own parameters, which are trained and saved, and shares the others with the base.
    """

    def current(self) -> nn.Module:
        return self.adapters[self.active[-1]] if self.active else self.base

    def conflicting_adapters(self, names: Sequence[str]) -> list[str]:
        inner = self.base.configs if isinstance(self.base, AdapterWrapper) else {}
        here = [name for name in names if name in self.configs]
        return here + [name for name in names if name in inner] if here else []

    def peft_tensors(self, name: str) -> dict[str, Tensor]:
        shared = {id(parameter) for parameter in self.base.parameters()}
        return {key: p for key, p in self.adapters[name].named_parameters() if id(p) not in shared}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module does; in a mixed batch its first argument and its result are tensors of rows."""
        if self.mixed is None and self.active:
            return self._act(self.active[-1], *args, **kwargs)
        y = self.base(*args, **kwargs)
        for names, rows in self.mixed.groups(args[0]) if self.mixed is not None else ():
            for name in (name for name in names if name in self.configs):
                y = y.index_copy(0, rows, self._act(name, args[0][rows], *args[1:], **kwargs))
        return y

    def _act(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """The copy computes in the dtype of the base, whatever its own parameters are kept in."""
        return functional_call(self.adapters[name], self._as_in_base(name), args, kwargs)

    def _as_in_base(self, name: str) -> dict[str, Tensor]:
        base = get_base_layer(self.base)
        return {key: own.to(base.get_parameter(key).dtype) for key, own in self.peft_tensors(name).items()}

    def merged(self) -> nn.Module:
        return shallow_copy(self.current(), self._as_in_base(self.active[-1]))


class Rows(nn.Module):
    """Rows of one adapter, and whose they are.

    Shapes: ids (n), rows (n, D)
    """

    ids: Tensor
    order: Tensor

    def __init__(self, ids: Sequence[int], rows: Tensor):
        super().__init__()
        self.rows = nn.Parameter(rows)
        self.register_buffer("ids", torch.tensor(ids), persistent=False)
        self.register_buffer("order", self.ids.argsort(), persistent=False)

    def of(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Which tokens have a row, and which one: (...) -> (...), (...)."""
        ranked = self.ids[self.order]
        place = torch.searchsorted(ranked, tokens).clamp(max=len(ranked) - 1)
        return ranked[place] == tokens, self.order[place]


class TokenRows(AdapterWrapper):
    """An embedding, or what is tied to it, with rows of the adapters' own (final)."""

    def __init__(self, base: nn.Module, path: str):
        super().__init__(base, path)
        self.shared: set[str] = set()  # the adapters whose rows are another place's

    def add_adapter(self, name: str, adapter: nn.Module, config: Any = None) -> None:
        self.shared.discard(name)
        super().add_adapter(name, adapter, config)

    def share(self, name: str, places: Iterable[TokenRows]) -> None:
        """Hold the rows that the embedding which this one is tied to has."""
        held = [place for place in places if name in place.configs and name not in place.shared]
        tied = next(place for place in held if _weight(place) is _weight(self))
        self.add_adapter(name, tied.adapters[name], tied.configs[name])
        self.shared.add(name)

    def conflicting_adapters(self, names: Sequence[str]) -> list[str]:
        held = [name for name in names if name in self.configs]
        ids = [token for name in held for token in self.adapters[name].ids.tolist()]
        return held if len(set(ids)) < len(ids) else []

    def peft_tensors(self, name: str) -> dict[str, Tensor]:
        return {} if name in self.shared else {"token_adapter.trainable_tokens_delta": self.adapters[name].rows}

    def forward(self, x: Tensor) -> Tensor:
        """Indices (...) -> (..., D) of an embedding, (..., D) -> (..., V) of a head."""
        y = self.base(x)
        if self.mixed is None:
            return self._changed(x, y, self.active)
        for names, rows in self.mixed.groups(x):
            y = y.index_copy(0, rows, self._changed(x[rows], y[rows], names))
        return y

    def _changed(self, x: Tensor, y: Tensor, names: Sequence[str]) -> Tensor:
        for adapter in (self.adapters[name] for name in names if name in self.configs):
            if isinstance(get_base_layer(self.base), nn.Linear):
                bias = None if self.base.bias is None else self.base.bias[adapter.ids].to(x.dtype)
                y = y.index_copy(-1, adapter.ids, F.linear(x, adapter.rows.to(x.dtype), bias))
            else:
                has_row, row = adapter.of(x)
                y = torch.where(has_row.unsqueeze(-1), F.embedding(row, adapter.rows).to(y.dtype), y)
        return y

    @property
    def weight(self) -> Tensor:
        """The embedding with the rows of the active adapters in it."""
        weight: Tensor = self.base.weight
        for adapter in (self.adapters[name] for name in self.active):
            weight = weight.index_copy(0, adapter.ids, adapter.rows.to(weight.dtype))
        return weight

    def merged(self) -> nn.Module:
        return shallow_copy(get_base_layer(self.base), {"weight": self.weight})


def _weight(place: TokenRows) -> nn.Parameter:
    return get_base_layer(place.base).get_parameter("weight")
