"""What to adapt and how: `LoraConfig`, with PEFT's field names, and which modules it means.

Names are matched as PEFT 0.21 does (`check_target_module_exists`), but for two things that are wrong there: an entry
that matches nothing is an error even if another one matches, and `layers_to_transform` also holds for modules named
in full.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from minilora.errors import ConfigError, TargetError

INITS = (True, "gaussian")
RENAMED = {"r": "lora_r"}  # fields whose flag has another name: r alone says too little
T = TypeVar("T")


@dataclass(frozen=True)
class LoraConfig:
    """How a model is adapted. Field names and meanings are PEFT's.

    Raises:
        ConfigError: a value that cannot work; all of them in one message.
    """

    r: int = field(default=16, metadata={"help": "rank of the update", "example": "8"})
    lora_alpha: float = field(default=32, metadata={"help": "scale of the update: it is multiplied by alpha / r"})
    lora_dropout: float = field(default=0.0, metadata={"help": "share of a layer's inputs that the adapter misses"})
    target_modules: str | tuple[str, ...] = field(
        default="all-linear",
        metadata={"help": "modules to adapt: all-linear (all but the head), names such as q_proj,v_proj, or a regex"},
    )
    exclude_modules: str | tuple[str, ...] = field(
        default=(), metadata={"help": "modules to leave out: names or a regex"}
    )
    layers_to_transform: tuple[int, ...] | None = field(
        default=None, metadata={"help": "numbers of the layers to adapt"}
    )
    layers_pattern: tuple[str, ...] = field(default=(), metadata={"help": "name of the list of layers, if unusual"})
    rank_pattern: Mapping[str, int] = field(default_factory=dict, metadata={"help": "JSON: r for single modules"})
    alpha_pattern: Mapping[str, float] = field(
        default_factory=dict, metadata={"help": "JSON: alpha for single modules"}
    )
    use_rslora: bool = field(default=False, metadata={"help": "multiply by alpha / sqrt(r) instead of alpha / r"})
    init_lora_weights: bool | str = field(
        default=True, metadata={"help": "start values of A: true or gaussian; B is 0"}
    )

    def __post_init__(self) -> None:
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            value = getattr(self, name)
            if name == "layers_pattern" and isinstance(value, str):
                value = (value,)
            if not isinstance(value, str):
                object.__setattr__(self, name, tuple(value or ()))
        if self.layers_to_transform is not None:
            layers = self.layers_to_transform
            object.__setattr__(self, "layers_to_transform", (layers,) if isinstance(layers, int) else tuple(layers))
        if bad := self._problems():
            raise ConfigError("LoraConfig: " + "; ".join(bad))

    def _problems(self) -> list[str]:
        bad = []
        ranks = {"r": self.r} | {f"rank_pattern[{key!r}]": value for key, value in self.rank_pattern.items()}
        alphas = {"lora_alpha": self.lora_alpha} | {f"alpha_pattern[{k!r}]": v for k, v in self.alpha_pattern.items()}
        bad += [f"{name} is {r!r}, need a whole number of at least 1" for name, r in ranks.items() if not _is_rank(r)]
        bad += [f"{name} is {a!r}, need a number above 0" for name, a in alphas.items() if not _is_positive(a)]
        if not isinstance(self.lora_dropout, int | float) or not 0 <= self.lora_dropout < 1:
            bad.append(f"lora_dropout is {self.lora_dropout!r}, need a number from 0 to below 1")
        if not isinstance(self.use_rslora, bool):
            bad.append(f"use_rslora is {self.use_rslora!r}, need true or false")
        if self.init_lora_weights not in INITS:
            bad.append(f"init_lora_weights is {self.init_lora_weights!r}, accepted are {list(INITS)}")
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            bad.append("layers_to_transform needs target_modules to be a list of names")
        if self.layers_pattern and self.layers_to_transform is None:
            bad.append("layers_pattern needs layers_to_transform")
        for pattern in (self.target_modules, self.exclude_modules, *self.rank_pattern, *self.alpha_pattern):
            try:
                re.compile(pattern if isinstance(pattern, str) else "")
            except re.error as error:
                bad.append(f"{pattern!r} is not a regular expression ({error})")
        return bad

    def rank(self, path: str) -> int:
        """r of one module: the first key of `rank_pattern` that matches its path, else `r`."""
        return _first_match(self.rank_pattern, path, self.r)

    def alpha(self, path: str) -> float:
        """α of one module, likewise."""
        return _first_match(self.alpha_pattern, path, self.lora_alpha)


def select_targets(linears: Sequence[str], config: LoraConfig, head: str | None = None) -> list[str]:
    """Those of the `linears` (paths such as "model.layers.0.self_attn.q_proj") that `config` means.

    `head` is the output head's path, which "all-linear" leaves alone.

    Raises:
        TargetError: nothing matches, or an entry of `target_modules`, `exclude_modules`, `rank_pattern` or
            `alpha_pattern` matches nothing; the message lists what there is.
    """
    targets = config.target_modules
    if isinstance(targets, str) and targets.lower() == "all-linear":
        matched = [path for path in linears if path != head]
    else:
        matched = [path for path in linears if _matches(targets, path) and _is_in_layers(path, config)]
    chosen = [path for path in matched if not _matches(config.exclude_modules, path)]
    unmatched = _unmatched(linears, chosen, config)
    if unmatched or not chosen:
        kinds = sorted({path.rpartition(".")[2] for path in linears})
        what = "; ".join(unmatched) or "target_modules and exclude_modules leave nothing"
        raise TargetError(f"{what}. The model's linear modules end in {kinds}")
    return chosen


def _unmatched(linears: Sequence[str], chosen: Sequence[str], config: LoraConfig) -> list[str]:
    """One phrase for each entry of the config that names nothing."""
    found = []
    for name in ("target_modules", "exclude_modules"):
        entries = getattr(config, name)
        for entry in [entries] if isinstance(entries, str) else [[each] for each in entries]:
            is_general = isinstance(entry, str) and entry.lower() == "all-linear"
            if entry and not is_general and not any(_matches(entry, path) for path in linears):
                found.append(f"no linear module matches {name} {entry if isinstance(entry, str) else entry[0]!r}")
    for number in config.layers_to_transform or ():
        alone = replace(config, layers_to_transform=(number,))
        if not any(_matches(config.target_modules, path) and _is_in_layers(path, alone) for path in linears):
            found.append(f"no linear module of target_modules is in layer {number} of layers_to_transform")
    for name in ("rank_pattern", "alpha_pattern"):
        keys = getattr(config, name)
        found += [
            f"no adapted module matches {name} {key!r}" for key in keys if not any(_is_key(key, p) for p in chosen)
        ]
    return found


def _matches(entries: str | Sequence[str], path: str) -> bool:
    """A string is a regular expression for the whole path; a list holds paths, or what they end in after a dot."""
    if isinstance(entries, str):
        return bool(entries) and re.fullmatch(entries, path) is not None
    return any(path == entry or path.endswith("." + entry) for entry in entries)


def _is_in_layers(path: str, config: LoraConfig) -> bool:
    if config.layers_to_transform is None:
        return True
    patterns = [rf"(?:^|.*?\.){name}\.(\d+)\." for name in config.layers_pattern] or [r".*?\.[^.]*\.(\d+)\."]
    numbers = [found.group(1) for pattern in patterns if (found := re.match(pattern, path))]
    return bool(numbers) and int(numbers[0]) in config.layers_to_transform


def _is_key(key: str, path: str) -> bool:
    return re.match(rf"(.*\.)?({key})$", path) is not None


def _first_match(pattern: Mapping[str, T], path: str, default: T) -> T:
    return next((value for key, value in pattern.items() if _is_key(key, path)), default)


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")
