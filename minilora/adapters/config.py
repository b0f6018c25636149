"""`LoraConfig`, with PEFT's field names, and which modules of a model it matches.

Names are matched as in PEFT 0.21 (`check_target_module_exists`), with four corrections: an entry that matches nothing
is an error even if another one matches, `layers_to_transform` also applies to modules given by their full path, an
entry of `modules_to_save` does not match the end of a longer name ("head" is not "lm_head"), and a string that is a
plain name, such as "q_proj", is a list of this name. Other strings are regular expressions for the whole path.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from minilora.errors import ConfigError, TargetError, in_recipe
from minilora.lora import lora_scale
from minilora.options import check_types, document_fields, option, reject_foreign_kwargs

Bias = Literal["none", "all", "lora_only"]
Task = Literal["CAUSAL_LM", "SEQ_CLS", "TOKEN_CLS", "SEQ_2_SEQ_LM", "QUESTION_ANS", "FEATURE_EXTRACTION"]
HEADS = {  # names of heads in transformers; they start at random, so they are trained in full
    **dict.fromkeys(("SEQ_CLS", "TOKEN_CLS"), ("score", "classifier", "pre_classifier", "classification_head")),
    "QUESTION_ANS": ("qa_outputs",),
}
INITS = (True, "gaussian", "pissa")
RECIPES = {  # start values that are recipes
    **dict.fromkeys(("eva", "corda"), "starts_from_inputs"),
    "lora_ga": "starts_from_gradients",
    **dict.fromkeys(("olora", "loftq"), "starts_from_weights"),
}
PATTERNS = ("target_modules", "exclude_modules")  # a string that is no plain name is a regular expression there
NAME_FIELDS = (*PATTERNS, "layers_pattern", "modules_to_save")
PLAIN_NAME = re.compile(r"\^?[\w-]+(\.[\w-]+)*")  # a name, its last parts, or ^ and all of it; here a dot is a dot
T = TypeVar("T")


@reject_foreign_kwargs(
    rank="use r",
    alpha="use lora_alpha",
    dropout="use lora_dropout",
    inference_mode="a loaded adapter is frozen unless load_adapter gets trainable=True",
    fan_in_fan_out="it follows from the layer's class; leave it out",
    target_parameters=in_recipe("experts"),
    ensure_weight_tying="modules that share a weight are trained apart; PEFT's files that have it are read",
)
@document_fields
@dataclass(frozen=True)
class LoraConfig:
    """The settings of an adapter. Field names and meanings are PEFT's.

    Raises:
        ConfigError: values of the wrong type, or else values that cannot work; all of them in one message.
    """

    r: int = option(16, "rank of the update; a higher rank can learn more, and trains more parameters")
    lora_alpha: float = option(32, "alpha: the update is multiplied by alpha / r; keep it when you change r")
    lora_dropout: float = option(0.0, "dropout probability of the adapter's input")
    target_modules: str | tuple[str, ...] = option(
        "all-linear",
        "modules to adapt: all-linear (all but the head), names such as q_proj,v_proj, or a regular expression",
    )
    exclude_modules: str | tuple[str, ...] = option((), "modules not to adapt: names or a regular expression")
    layers_to_transform: tuple[int, ...] | None = option(
        None, "numbers of the layers to adapt, from 0, e.g. 0,1; needs names in target_modules (default: all layers)"
    )
    layers_pattern: tuple[str, ...] = option((), "name of the list of layers, such as h in GPT-2 (default: any)")
    rank_pattern: Mapping[str, int] = option(dict, 'r of single modules, as JSON: {"q_proj": 4}')
    alpha_pattern: Mapping[str, float] = option(dict, 'alpha of single modules, as JSON: {"q_proj": 8}')
    use_rslora: bool = option(False, "multiply by alpha / sqrt(r) instead of alpha / r")
    use_dora: bool = option(False, "train the norm of each row of the weight separately (DoRA)")
    init_lora_weights: bool | str = option(
        True, "start of A and B: true (A uniform, B = 0), gaussian (A normal, B = 0), or pissa (from the weights)"
    )
    bias: Bias = option("none", "biases to train: none, all, or lora_only (those of the adapted modules)")
    lora_bias: bool = option(False, "add a trained bias to B")
    modules_to_save: tuple[str, ...] = option((), "modules to train in full and to save with the adapter, e.g. norm")
    trainable_token_indices: tuple[int, ...] | Mapping[str, tuple[int, ...]] | None = option(
        None, "ids of tokens whose embeddings are trained, e.g. 5,6; or JSON of module names and ids"
    )
    task_type: Task | None = option(
        None, "what the model is for; a head that its name implies, such as a classifier's, is trained in full"
    )

    def __post_init__(self) -> None:
        for name in NAME_FIELDS:
            value = getattr(self, name) or ()
            if isinstance(value, str):
                value = "all-linear" if value.lower() == "all-linear" else value
                is_pattern = value == "all-linear" or value[0] == "^" or not PLAIN_NAME.fullmatch(value)
                value = value if is_pattern and name in PATTERNS else (value,)
            object.__setattr__(self, name, _as_tuple(value))
        layers, tokens = self.layers_to_transform, self.trainable_token_indices
        layers = (layers,) if isinstance(layers, int) else _as_tuple(layers) or None
        object.__setattr__(self, "layers_to_transform", layers)
        if isinstance(tokens, Mapping):
            tokens = {name: _as_tuple(ids) for name, ids in tokens.items()}
        object.__setattr__(self, "trainable_token_indices", _as_tuple(tokens))
        check_types(self)
        if bad := self._problems():
            raise ConfigError("LoraConfig: " + "; ".join(bad))

    def _problems(self) -> list[str]:
        ranks = {"r": self.r} | {f"rank_pattern[{key!r}]": value for key, value in self.rank_pattern.items()}
        alphas = {"lora_alpha": self.lora_alpha} | {f"alpha_pattern[{k!r}]": v for k, v in self.alpha_pattern.items()}
        need, most = "need a whole number of at least 1, below 2³¹", sys.float_info.max
        bad = [f"{name} is {r!r}, {need}" for name, r in ranks.items() if not 1 <= r < 2**31]
        bad += [f"{name} is {a!r}, need a number above 0" for name, a in alphas.items() if not 0 < a <= most]
        if not 0 <= self.lora_dropout < 1:
            bad.append(f"lora_dropout is {self.lora_dropout!r}, need a number from 0 to below 1")
        init = self.init_lora_weights
        if init not in INITS:
            elsewhere = f"; {in_recipe(RECIPES[init])}" if init in RECIPES else ""
            accepted = ", ".join(str(init).lower() for init in INITS)
            bad.append(f"init_lora_weights is {init!r}, accepted are {accepted}{elsewhere}")
        if self.lora_bias and (self.use_dora or init is not True):
            bad.append("lora_bias goes neither with use_dora nor with other start values than the default")
        tokens = {} if self.trainable_token_indices is None else self.trainable_token_indices
        lists = tokens.values() if isinstance(tokens, Mapping) else [tokens]
        if any(not ids or len(set(ids)) < len(ids) or min(ids) < 0 for ids in lists):
            need = "need ids from 0, each once, or module names with such ids"
            bad.append(f"trainable_token_indices is {self.trainable_token_indices!r}, {need}")
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            bad.append("layers_to_transform needs target_modules to be a list of names, such as q_proj,v_proj")
        if self.layers_pattern and self.layers_to_transform is None:
            bad.append("layers_pattern needs layers_to_transform")
        patterns = [names for names in (self.target_modules, self.exclude_modules) if isinstance(names, str)]
        for pattern in (*patterns, *self.layers_pattern, *self.rank_pattern, *self.alpha_pattern):
            try:
                _ = PLAIN_NAME.fullmatch(pattern) or re.compile(pattern)
            except re.error as error:
                bad.append(f"{pattern!r} is not a regular expression ({error})")
        return bad

    def rank(self, path: str) -> int:
        """Return r of one module: the value of the first key of `rank_pattern` that matches its path, else `r`."""
        return _first_match(self.rank_pattern, path, self.r)

    def alpha(self, path: str) -> float:
        """Return α of one module, likewise."""
        return _first_match(self.alpha_pattern, path, self.lora_alpha)

    def scale(self, path: str) -> float:
        """Return s of one module."""
        return lora_scale(self.rank(path), self.alpha(path), self.use_rslora)


def select_targets(
    linears: Sequence[str], config: LoraConfig, head: str | None = None, embeddings: Sequence[str] = ()
) -> list[str]:
    """Return the paths of the modules that `config` adapts.

    "all-linear" matches the paths `linears` without the `head`; `embeddings` are adapted only if named.
    """
    paths = [*linears, *embeddings]
    if config.target_modules == "all-linear":
        chosen = [path for path in linears if path != head and not is_excluded(path, config)]
    else:
        chosen = [path for path in paths if is_target(path, config)]
    problems = _unmatched_fields(paths, chosen, config)
    does_more = config.modules_to_save or config.trainable_token_indices
    if not chosen and (config.target_modules or not does_more):
        problems.append("target_modules, exclude_modules and modules_to_save leave nothing to adapt")
    if problems:
        raise TargetError(f"{'; '.join(problems)}. The model's modules that can be adapted end in {_last_parts(paths)}")
    return chosen


def select_saved(paths: Sequence[str], config: LoraConfig) -> list[str]:
    """Return the paths of the modules that are trained in full; none is in another.

    They are those of `modules_to_save` and, if `task_type` is a classifier's, its head.
    """
    if unknown := _unmatched([name for name in config.modules_to_save if name not in _heads(config)], paths):
        there = _last_parts([path for path in paths if not path.rpartition(".")[2].isdecimal()])
        raise TargetError(f"no module matches modules_to_save {unknown}. The model's modules end in {there}")
    saved = [path for path in paths if matches(config.modules_to_save + _heads(config), path)]
    return [path for path in saved if not any(path.startswith(f"{other}.") for other in saved)]


def is_target(path: str, config: LoraConfig) -> bool:
    """Return whether `target_modules` and the fields that limit it select this path."""
    layers = config.layers_to_transform
    is_in_layers = layers is None or _layer(path, config) in layers
    return matches(config.target_modules, path) and is_in_layers and not is_excluded(path, config)


def matches(entries: str | Sequence[str], path: str) -> bool:
    """Match a path: a string is a regular expression for the whole path; a list holds paths, or ends after a dot."""
    if isinstance(entries, str):
        return bool(entries) and re.fullmatch(entries, path) is not None
    return any(path == entry or path.endswith("." + entry) for entry in entries)


def _unmatched_fields(paths: Sequence[str], chosen: Sequence[str], config: LoraConfig) -> list[str]:
    """Return a message for each entry of the config that matches nothing."""
    bad = []
    for name in ("target_modules", "exclude_modules"):
        entries = getattr(config, name)
        if not (name == "target_modules" and config.target_modules == "all-linear"):
            bad += [f"no module that can be adapted matches {name} {entry!r}" for entry in _unmatched(entries, paths)]
    for number in config.layers_to_transform or ():
        if not any(matches(config.target_modules, path) and _layer(path, config) == number for path in paths):
            bad.append(f"no module of target_modules is in layer {number} of layers_to_transform")
    for name in ("rank_pattern", "alpha_pattern"):
        idle = [key for key in getattr(config, name) if not any(_first_match({key: True}, p, False) for p in chosen)]
        bad += [f"no adapted module matches {name} {key!r}" for key in idle]
    return bad


def _unmatched(entries: str | Sequence[str], paths: Sequence[str]) -> list[str]:
    """Return the entries that match none of the paths; a regular expression is one entry."""
    if isinstance(entries, str):
        return [entries] if entries and not any(matches(entries, path) for path in paths) else []
    return [entry for entry in entries if not any(matches((entry,), path) for path in paths)]


def _last_parts(paths: Sequence[str]) -> list[str]:
    return sorted({path.rpartition(".")[2] for path in paths})


def is_excluded(path: str, config: LoraConfig) -> bool:
    """Return whether `exclude_modules` names a path, or it is trained in full."""
    is_saved = any(f".{name}." in f".{path}." for name in config.modules_to_save + _heads(config))
    return is_saved or matches(config.exclude_modules, path)


def _heads(config: LoraConfig) -> tuple[str, ...]:
    return HEADS.get(config.task_type or "", ())


def _layer(path: str, config: LoraConfig) -> int | None:
    """Return the number of the layer that a module is in, by the first of `layers_pattern` that matches."""
    named = [rf"(?:^|.*?\.)(?:{name})\.(?P<number>\d+)\." for name in config.layers_pattern]
    for pattern in named or [r".*?\.[^.]*\.(?P<number>\d+)\."]:
        if match := re.match(pattern, path):
            return int(match["number"])
    return None


def _first_match(pattern: Mapping[str, T], path: str, default: T) -> T:
    parts = path.split(".")
    names = {f"^{path}", *(".".join(parts[at:]) for at in range(len(parts)))}
    for key, value in pattern.items():
        if key in names or (not PLAIN_NAME.fullmatch(key) and re.match(rf"(.*\.)?({key})$", path)):
            return value
    return default


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | set | frozenset) else value
