"""A place in a model where adapters act: a module of the model, and by name what each adapter puts there."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from minilora.adapters.config import LoraConfig
from minilora.adapters.functional import dropout_seed
from minilora.errors import ShapeError, TargetError

Shape = tuple[int, ...]
Group = tuple[tuple[str, ...], Tensor]  # adapters, and the numbers of the rows that they act on


class Adapted(nn.Module, ABC):
    """A module of a model and what adapters, by name, put in its place (abstract).

    Args:
        base: the module; it is held, not copied.
        path: its path in the model.
    """

    base: Any
    adapters: Any  # an `nn.ModuleDict`: mypy takes its values for any module, here they are of the class's own

    def __init__(self, base: nn.Module, path: str):
        super().__init__()
        self.base = base
        self.path = path
        self.adapters = nn.ModuleDict()
        self.configs: dict[str, LoraConfig] = {}
        self.active: tuple[str, ...] = ()
        self.mixed: MixedBatch | None = None
        self.dropout_seeds: dict[str, Tensor] = {}
        self.train(base.training)

    def __getattr__(self, name: str) -> Any:
        """What a model asks of the module that it put here, such as `out_features`, that module answers."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base" or name.startswith("__"):
                raise
            return getattr(self.current(), name)

    def hold(self, name: str, config: LoraConfig, adapter: nn.Module) -> None:
        """Hold one more adapter, on the base's device; it acts once its name is in `active`.

        A base on the device "meta" has no numbers; its adapters keep theirs where they are.

        Raises:
            TargetError: there is one of that name already.
        """
        if name in self.configs:
            raise TargetError(f"{self.path} has an adapter {name!r} already; it has {sorted(self.configs)}")
        example = next(self.base.parameters())
        self.adapters[name] = adapter if example.is_meta else adapter.to(example.device)
        self.configs[name] = config

    def drop(self, name: str) -> None:
        """Hold it no longer."""
        del self.adapters[name], self.configs[name]
        self.active = tuple(each for each in self.active if each != name)

    def trained(self, name: str) -> list[nn.Parameter]:
        """The parameters of one adapter, without those that it shares with the base."""
        shared = {id(parameter) for parameter in self.base.parameters()}
        return [parameter for parameter in self.adapters[name].parameters() if id(parameter) not in shared]

    def seed_dropout(self, key: str) -> None:
        """Say which dropout masks the next forward pass draws: each adapter has its own, and each place."""
        dropping = [name for name, config in self.configs.items() if config.lora_dropout]
        self.dropout_seeds = {name: torch.tensor(dropout_seed(f"{key}/{self.path}/{name}")) for name in dropping}

    @abstractmethod
    def add(self, name: str, config: LoraConfig, tensors: Mapping[str, Tensor]) -> None:
        """Hold the adapter of these tensors, by the names that the kind of place has for them."""

    @abstractmethod
    def current(self) -> nn.Module:
        """The module whose attributes this one has."""

    @abstractmethod
    def rivals(self, names: Sequence[str]) -> list[str]:
        """Those of the adapters that cannot act together, if there are several."""

    @abstractmethod
    def tensors(self, name: str) -> dict[str, Tensor]:
        """What PEFT's file has of an adapter, by the ends of its names there: after the module's path and a dot."""

    @abstractmethod
    def merged(self) -> nn.Module:
        """A plain module that does what the active adapters make of the base, which stays as it is."""


class MixedBatch:
    """Which adapter each row of a batch has; None is none.

    A layer gets the rows themselves, or their tokens end to end, so many of each as `lengths` says.
    """

    def __init__(self, names: Sequence[str | None]):
        self.names = tuple(names)
        self.begin(())

    def begin(self, lengths: Sequence[int]) -> None:
        """So long are the rows of what comes now."""
        self.lengths = lengths
        self._known: dict[tuple[int, torch.device], list[Group]] = {}  # the same for all layers of a model

    def groups(self, x: Tensor) -> list[Group]:
        """The adapters that act, and the numbers of the rows of x that they act on; every row is in one group.

        Raises:
            ShapeError: x has another number of rows.
        """
        key = x.size(0), x.device
        if key not in self._known:
            self._known[key] = self._found(x)
        return self._known[key]

    def _found(self, x: Tensor) -> list[Group]:
        lengths = self.lengths or [1] * len(self.names)
        lasts = [min(length, 1) for length in lengths]  # a head may be given the last token of each row that has any
        if x.size(0) not in (sum(lengths), sum(lasts)):
            raise ShapeError(
                f"a layer was given {x.size(0)} rows in a batch of {len(self.names)}, so whose is not known"
            )
        counts = torch.tensor(lengths if x.size(0) == sum(lengths) else lasts)
        kinds = list(dict.fromkeys(self.names))
        owners = torch.tensor([kinds.index(name) for name in self.names]).repeat_interleave(counts)
        rows = [(owners == i).nonzero().flatten().to(x.device) for i in range(len(kinds))]
        return [((name,) if name else (), index) for name, index in zip(kinds, rows, strict=True) if len(index)]


def has_hooks(module: nn.Module) -> bool:
    """Does more happen in a call than its forward? In the place of the module, another one would leave that out."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def innermost(module: nn.Module) -> nn.Module:
    """The module of the model itself, under what adapters put there."""
    while isinstance(module, Adapted):
        module = module.base
    return module


def twin(module: nn.Module, own: Mapping[str, Tensor | None]) -> nn.Module:
    """A copy of a module that shares its parameters and buffers with it, but for its own: frozen, or None for none."""
    held = [*module.parameters(), *module.buffers()]
    copied = copy.deepcopy(module, {id(tensor): tensor for tensor in held})
    for name, tensor in own.items():
        where, _, last = name.rpartition(".")
        parameter = None if tensor is None else nn.Parameter(tensor.detach(), requires_grad=False)
        copied.get_submodule(where).register_parameter(last, parameter)
    return copied
