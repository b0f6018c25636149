"""Count the tensors that live while something is computed, on the device "meta" without computing it.

There a tensor has a shape and no numbers, and the code that a run will execute allocates and frees what it would on
another device. So the count needs no formula that would have to follow the code.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors that operations made, and that still live, except those of `known` storages."""

    def __init__(self, known: Iterable[Tensor] = ()):
        super().__init__()
        self.now = self.most = 0
        self.storages = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and count its results that are no views of tensors that were there."""
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._hold(tensor.untyped_storage())
        return result

    def _hold(self, storage: UntypedStorage) -> None:
        if storage._cdata not in self.storages:
            self.storages.add(storage._cdata)
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._let_go, storage._cdata, storage.nbytes())

    def _let_go(self, place: int, size: int) -> None:
        self.storages.remove(place)
        self.now -= size
