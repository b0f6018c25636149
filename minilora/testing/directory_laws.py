"""Laws of the directory of a LoRA adapter in PEFT's layout: its two files are complete and agree with each other.

    adapter_config.json         {"peft_type": "LORA", "r": …, "lora_alpha": …, "target_modules": […], …}
    adapter_model.safetensors   base_model.model.<path>.lora_A.weight (r, in), lora_B.weight (out, r), …

What passes can be loaded: with this config PEFT adapts each module that has tensors, and with their shapes. It is not
promised that the adapter was trained, that each target and pattern matches a module, or that the model, which is not
known here, has these modules. PEFT itself writes B = 0 and names that match nothing, and both do no harm.

Names and shapes are read once more here, and nothing is shared with `minilora.adapters`. Patterns of the config are run
as regular expressions, as PEFT does.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from minilora.testing.laws import Comparison, Law, NotApplicable, claim

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
A, B = "lora_A.weight", "lora_B.weight"
OF_EMBEDDINGS = {"lora_embedding_A": A, "lora_embedding_B": B}
BIAS_OF_B = "lora_B.bias"
MAGNITUDE = "lora_magnitude_vector"
BASE_BIAS = "base_layer.bias"
ROWS = "token_adapter.trainable_tokens_delta"
BASE_WEIGHT = "base_layer.weight"
PARTS = (A, B, *OF_EMBEDDINGS, BIAS_OF_B, MAGNITUDE, BASE_WEIGHT, BASE_BIAS, ROWS)  # ends of names
EMBEDDINGS = ("embed_tokens.weight", "lm_head.weight")  # PEFT adds them if the vocabulary was changed
WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "modules_to_save", "original_module")
HEADS = ("classifier", "score")  # PEFT names both for a classifier, which has one of them
EXCLUDED, NUMBERS, PATTERN = "exclude_modules", "layers_to_transform", "layers_pattern"  # what leaves modules out
SHOWN = 10  # problems of one law at most
Problems = Iterator[str]  # what is wrong
Shape = tuple[int, ...]


class Adapter:
    """An adapter's config and tensors.

    Attributes:
        names: of tensors, without the prefix.
        parts: the tensors of each adapted module, by its path and one of `PARTS`; those of embeddings are A and B too.
        others: names of tensors that are no part of an adapted module.
        factors: A and B by path, where both are there.
    """

    def __init__(self, config: dict[str, Any], tensors: dict[str, Tensor]):
        self.config, self.tensors = config, tensors
        self.names = [name.removeprefix(PREFIX) for name in tensors if name.startswith(PREFIX)]
        self.parts: dict[str, dict[str, Tensor]] = {}
        self.others = list[str]()
        for name in self.names:
            end = next((end for end in PARTS if name.endswith(f".{end}")), None)
            if end is None:
                self.others.append(name)
            else:
                own = self.parts.setdefault(name.removesuffix(f".{end}"), {})
                own[OF_EMBEDDINGS.get(end, end)] = tensors[PREFIX + name]
        self.factors = {path: (own[A], own[B]) for path, own in self.parts.items() if {A, B} <= own.keys()}

    def listed(self, key: str) -> list[str]:
        """Return a list of names in the config, which may be null."""
        return self.config.get(key) or []


def read(path: Path) -> Adapter:
    """Read both files, or raise an exception if one is missing or malformed."""
    config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise ValueError(f"{CONFIG}: found {config!r:.40}, accepted is an object")
    return Adapter(config, load_file(path / WEIGHTS))


def meant(name: str, entry: str) -> bool:
    """Return whether a parameter is of a module whose path ends with an entry: PEFT compares the ends as text."""
    return any(name[: dot.start()].endswith(entry) for dot in re.finditer(r"\.", name))


def first_match(keys: Iterable[str], where: str) -> str | None:
    """Return the first key of a pattern that matches a module's path, as PEFT does: anchored at a dot and the end."""
    return next((key for key in keys if re.match(rf"(.*\.)?({key})$", where)), None)


def matches_target(where: str, target: str | list[str]) -> bool:
    """Return whether `target_modules` means a module: a regular expression, or ends of paths."""
    if isinstance(target, str):
        return re.fullmatch(target, where) is not None
    return any(where == entry or where.endswith(f".{entry}") for entry in target)


# --- the laws ---


def files(path: str | Path, case: None) -> Iterator[Comparison]:
    path, problem = Path(path), ""
    if (path / "adapter_model.bin").exists():
        problem = f"adapter_model.bin: found, accepted is only {WEIGHTS}: loading the other file can run code"
    try:
        read(path)
    except Exception as error:
        problem = f"{path}: found what cannot be read ({error}); accepted are {CONFIG} and {WEIGHTS}"
    yield claim("the directory", problem)


def config(adapter: Adapter) -> Problems:
    for key, (default, is_right, need) in FIELDS.items():
        value = adapter.config.get(key, default)
        if not is_right(value):
            yield f"{key}: found {value!r:.60}, accepted is {need}"


def finite_values(adapter: Adapter) -> Problems:
    for name, tensor in adapter.tensors.items():
        if not tensor.is_floating_point():
            yield f"{name}: found {tensor.dtype}, accepted are floating-point numbers"
        elif not (is_finite := tensor.isfinite()).all():
            yield f"{name}: found {(~is_finite).sum()} numbers that are inf or nan, accepted is none"


def names(adapter: Adapter) -> Problems:
    for name in adapter.tensors:
        if not name.startswith(PREFIX):
            yield f"{name}: accepted are names that begin with {PREFIX}; PEFT only warns of others"
        if wrappers := [part for part in name.split(".") if part in WRAPPERS]:
            yield f"{name}: accepted is the name in the plain model, without {wrappers[0]}"
    for where, own in adapter.parts.items():
        outer, inside, _ = where.partition(".base_layer")
        if inside and outer not in adapter.parts:
            yield f"{where}: accepted is {outer}, whose base_layer has no adapter of its own"
        is_head = where.endswith(("embed_tokens", "lm_head"))
        if BASE_WEIGHT in own and not is_head and f"{where}.lora_embedding_A" not in adapter.names:
            yield f"{where}.{BASE_WEIGHT}: is frozen; accepted is only an embedding's or a head's"
    is_saved = (*EMBEDDINGS, *[".bias"] * (adapter.config.get("bias", "none") == "all"))
    for name in adapter.others:
        is_whole = any(meant(name, entry) for entry in adapter.listed("modules_to_save"))
        if ".lora_" in name or not (is_whole or name.endswith(is_saved)):
            described = f"{', '.join(PARTS)}, and modules_to_save"
            yield f"{name}: is nothing that {CONFIG} describes; accepted are {described}"


def pairs(adapter: Adapter) -> Problems:
    for where, own in adapter.parts.items():
        if own.keys() != {ROWS} and not {A, B} <= own.keys():
            yield f"{where}: found only {', '.join(own)}, accepted are {A} and {B} and what belongs to them"
    if not adapter.parts and not adapter.others:
        yield "found no tensor, accepted is at least one pair of factors"


def factor_ranks(adapter: Adapter) -> Problems:
    ranks = adapter.config.get("rank_pattern") or {}
    for where, (lora_A, lora_B) in adapter.factors.items():
        key = first_match(ranks, where)
        r = adapter.config["r"] if key is None else ranks[key]
        found = f"{where}: found A {tuple(lora_A.shape)} and B {tuple(lora_B.shape)}"
        if lora_A.dim() != lora_B.dim() or lora_A.dim() < 2:
            yield f"{found}, accepted are two matrices or kernels"
            continue
        of_A, of_B = len(lora_A), lora_B.shape[1]
        is_stacked = adapter.listed("target_parameters") and of_A == of_B and of_A % r == 0  # r an expert
        is_grouped = of_A == r and lora_A.dim() > 2 and r % of_B == 0
        if not (is_stacked or is_grouped or of_A == of_B == r):
            source = "r" if key is None else f"rank_pattern[{key!r}], the first key that matches,"
            yield f"{found}, accepted are A ({r}, in) and B (out, {r}) since {source} is {r}"


def dora(adapter: Adapter) -> Problems:
    return optional(adapter, MAGNITUDE, "use_dora", lambda B: B[:1] if len(B) == 2 else (1, B[0], *B[2:]))


def biases(adapter: Adapter) -> Problems:
    for where, own in adapter.parts.items():
        if BASE_BIAS in own and adapter.config.get("bias", "none") == "none":
            yield f"{where}.{BASE_BIAS}: found {tuple(own[BASE_BIAS].shape)}, accepted is none since bias is 'none'"
    yield from optional(adapter, BIAS_OF_B, "lora_bias", lambda B: B[:1])


def optional(adapter: Adapter, part: str, field: str, shape: Callable[[Shape], Shape]) -> Problems:
    """Yield the modules in which an optional tensor is missing, has a wrong shape, or is there without its field."""
    is_on = bool(adapter.config.get(field))
    for where, (_, lora_B) in adapter.factors.items():
        own = adapter.parts[where]
        found = tuple(own[part].shape) if part in own else "none"
        right = shape(tuple(lora_B.shape)) if is_on else "none"
        if found != right:
            yield f"{where}.{part}: found {found}, accepted is {right} since {field} is {str(is_on).lower()}"


def whole_modules(adapter: Adapter) -> Problems:
    entries = adapter.listed("modules_to_save")
    lacking = [entry for entry in entries if not any(meant(name, entry) for name in adapter.names)]
    if set(HEADS) <= set(entries) and not set(HEADS) <= set(lacking):
        lacking = [entry for entry in lacking if entry not in HEADS]
    for entry in lacking:
        yield f"modules_to_save: found {entry!r}, accepted are modules whose tensors are in {WEIGHTS}"


def rows(adapter: Adapter) -> Problems:
    asked = adapter.config.get("trainable_token_indices") or {}
    found = {where: len(part[ROWS]) for where, part in adapter.parts.items() if ROWS in part}
    own = [tuple(ids) for ids in asked.values()] if isinstance(asked, dict) else [tuple(asked)]
    counts = [sorted(map(len, each)) for each in (own, set(own))]  # a tied head has the rows of the embedding
    if sorted(found.values()) not in counts:
        need = f"accepted are as many rows in {WEIGHTS} as tokens; there are {found or 'none'}"
        yield f"trainable_token_indices: found {asked!r:.60}, {need}"


def targets(adapter: Adapter) -> Problems:
    target = adapter.config.get("target_modules")
    parameters = [entry.rpartition(".")[0] for entry in adapter.listed("target_parameters")]
    if isinstance(target, str) and target.lower() == "all-linear":
        return
    outer = {where: where.partition(".base_layer")[0] for where in adapter.factors}  # of a module in a module
    for where, module in outer.items():
        is_meant = any(matches_target(path, target or []) for path in (where, module))
        if not is_meant and "" not in parameters and not matches_target(module, parameters):
            need = f"accepted is what matches all modules of {WEIGHTS}, {where} too"
            yield f"target_modules: found {target!r:.80}, {need}"


def layers(adapter: Adapter) -> Problems:
    config, target = adapter.config, adapter.config.get("target_modules") or []
    excluded, numbers, pattern = (config.get(key) for key in (EXCLUDED, NUMBERS, PATTERN))
    chosen = [numbers] if isinstance(numbers, int) else numbers
    names = [pattern] if isinstance(pattern, str) else pattern or []
    for where in adapter.factors:
        module = where.partition(".base_layer")[0]
        if not matches_target(module, target):
            continue  # `target_parameters` means it
        if excluded and matches_target(module, excluded):
            yield f"{EXCLUDED}: found {excluded!r:.80}, accepted is what keeps {where}, which is in {WEIGHTS}"
        is_by_end = isinstance(target, list) and module not in target
        if chosen and is_by_end and layer_number(module, names) not in chosen:
            found = f"{numbers!r:.80}" + f" with {PATTERN} {pattern!r:.80}" * bool(pattern)
            yield f"{NUMBERS}: found {found}, accepted is what keeps {where}, which is in {WEIGHTS}"


def layer_number(where: str, patterns: Sequence[str]) -> int | None:
    """Return the first number behind a name, any or one of the patterns, in the path of a module, as PEFT does."""
    expressions = [rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\." for pattern in patterns] or [r".*?\.[^.]*\.(?P<idx>\d+)\."]
    return next((int(found["idx"]) for each in expressions if (found := re.match(each, where))), None)


def _is_rank(value: Any) -> bool:
    return type(value) is int and value >= 1  # not True, which is an int too


def _is_alpha(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def _is_pattern(is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: (
        value is None or (isinstance(value, dict) and all(map(is_right, value.values())) and all(map(_is_regex, value)))
    )


def _is_regex(value: str) -> bool:
    with suppress(re.error):
        return bool(re.compile(value))
    return False


def _is_layers(value: Any) -> bool:
    return value is None or all(type(number) is int for number in (value if isinstance(value, list) else [value]))


def _is_names(value: Any) -> bool:
    return value is None or (isinstance(value, list) and all(isinstance(entry, str) for entry in value))


def _is_target(value: Any) -> bool:
    return _is_regex(value) if isinstance(value, str) else _is_names(value)


TARGETS = (None, _is_target, "a list of names or a regular expression")
FLAG = (False, lambda value: isinstance(value, bool), "true or false")
FIELDS: dict[str, tuple[Any, Callable[[Any], bool], str]] = {  # key -> default, what is accepted, in words
    "peft_type": (None, lambda value: value == "LORA", "'LORA'"),
    "r": (None, _is_rank, "a whole number of at least 1"),
    "lora_alpha": (None, _is_alpha, "a number above 0"),
    "lora_dropout": (0.0, lambda value: type(value) in (int, float) and 0 <= value < 1, "a number from 0 to below 1"),
    "bias": ("none", lambda value: value in ("none", "all", "lora_only"), "'none', 'all' or 'lora_only'"),
    **dict.fromkeys(("target_modules", EXCLUDED, PATTERN), TARGETS),
    NUMBERS: (None, _is_layers, "a whole number or a list of them"),
    "modules_to_save": (None, _is_names, "a list of names or null"),
    "rank_pattern": (None, _is_pattern(_is_rank), "an object of regular expressions and whole numbers of at least 1"),
    "alpha_pattern": (None, _is_pattern(_is_alpha), "an object of regular expressions and numbers above 0"),
    **dict.fromkeys(("use_dora", "use_rslora", "lora_bias", "fan_in_fan_out"), FLAG),
}


def _law(name: str, where: str, statement: str, problems: Callable[[Any], Problems]) -> Law:
    """Return a law whose claim lists all problems that are found in a file."""

    def compare(path: str | Path, case: None) -> Iterator[Comparison]:
        try:
            adapter = read(Path(path))
        except Exception as error:
            raise NotApplicable(f"the files cannot be read: {error}") from error
        yield claim(where, "\n  ".join(islice(problems(adapter), SHOWN)))

    return Law("adapter_directory", name, statement, [None], compare)


LAWS = (
    Law("adapter_directory", "files", "both files can be read, and there is no adapter_model.bin", [None], files),
    _law("config", CONFIG, "the settings have the types and ranges of PEFT's", config),
    _law("values", WEIGHTS, "all numbers are floating-point and finite", finite_values),
    _law("names", WEIGHTS, "each tensor is what an adapter trains, by its name in the plain model", names),
    _law("pairs", WEIGHTS, "A and B are there for each module", pairs),
    _law("shapes", WEIGHTS, "A is (r, in) and B (out, r), r being that of the module", factor_ranks),
    _law("dora", WEIGHTS, "with use_dora each module has a magnitude of a number an output, else none", dora),
    _law("biases", WEIGHTS, "the biases are those that `bias` and `lora_bias` name", biases),
    _law("modules_to_save", CONFIG, "each entry of modules_to_save has tensors", whole_modules),
    _law("rows", CONFIG, "there is a row for each token of trainable_token_indices", rows),
    _law("targets", CONFIG, "target_modules matches the adapted modules", targets),
    _law("layers", CONFIG, f"{NUMBERS}, {PATTERN} and {EXCLUDED} leave out no module that has tensors", layers),
)
