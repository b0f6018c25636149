"""Modules that an adapter trains in full (`modules_to_save`), or only the bias of (`bias="all"`).

Each adapter has a copy; the base stays what it was, and acts where no adapter does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
