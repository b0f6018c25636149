"""The model that flags name, the adapters on it, and how it is held."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minilora.adapter import set_adapter
from minilora.adapters.files import load_adapter
from minilora.adapters.find import base_held
from minilora.adapters.layout import base_model_of, base_quantization, classes_of, vocabulary_of
from minilora.cli import Options, say
from minilora.cli.flags import add_fields
from minilora.errors import ConfigError, FormatError
from minilora.llama import Llama
from minilora.models.bitsandbytes import QuantizeConfig, describe_in_words, is_four_bit
from minilora.models.classifier import Classifier, grow_vocabulary, load_for
from minilora.models.config import LlamaConfig, Unit
from minilora.models.hub import Location, fetch, locate
from minilora.models.tokenizer import Tokenizer, find_tokenizer, load_tokenizer
from minilora.runs.run import pick_device
from minilora.storage import BUILTIN, read_json, read_text


def add_model_flags(parser: argparse.ArgumentParser, many_adapters: bool = False) -> None:
    """--model, --adapter, --dtype, --device, and how the model is quantized."""
    group = parser.add_argument_group("model and device")
    group.add_argument(
        "--model",
        help="directory of the base model, or org/name[@revision] of the Hugging Face hub "
        "(default: the one the adapter was made for, else the built-in one)",
    )
    action, more = ("append", "; give it again for more") if many_adapters else ("store", "")
    group.add_argument("--adapter", action=action, help=f"directory of an adapter, or a hub id{more}")
    group.add_argument(
        "--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="number format (default: auto)"
    )
    group.add_argument("--device", default="auto", help="cpu, cuda, mps; auto: the best there is (default: auto)")
    add_fields(parser, QuantizeConfig, group.title or "", unset="as the adapter was trained")


@dataclass(frozen=True)
class Found:
    """What --model and --adapter name: where they are, and how the base is to be held and asked.

    `unit` is what gets one of the classes `labels`; None, if it is a language model. A model can be merged without a
    tokenizer.
    """

    base: Location
    adapters: tuple[Path, ...]
    quantize: QuantizeConfig
    tokenizer: Tokenizer | None
    training: Training
    unit: Unit | None
    labels: tuple[str, ...]

    def required_tokenizer(self) -> Tokenizer:
        """Return the tokenizer.

        Raises:
            FormatError: the model has none.
        """
        return self.tokenizer or load_tokenizer(self.base.name)


@dataclass(frozen=True)
class Loaded:
    """The model of --model and --adapter, and how to ask it; all adapters are active, under these names."""

    model: Llama
    tokenizer: Tokenizer
    adapters: tuple[str, ...]
    training: Training


def find(options: Options) -> Found:
    """What --model and --adapter name. What a name means on the hub is asked once."""
    if "" in (options["model"], *adapters(options)):
        raise ConfigError("--model or --adapter is empty; leave it out, or name something")
    paths = [fetch(name, "adapter") for name in adapters(options)]
    name = base_of({**options, "adapter": list(map(str, paths))})
    try:
        base = locate(name, "model")
    except FormatError as error:
        if options["model"] or not paths:
            raise
        adapter = adapters(options)[0]
        raise FormatError(
            f"{error} (the adapter {adapter} names it as its base model; --model names another)"
        ) from error
    tokenizer, training = _tokenizer(base, paths), how_trained(paths or [base.path])
    if tokenizer and training.template:
        tokenizer = tokenizer.with_template(training.template)
    quantize = _quantize(options, base.path, paths)
    return Found(base, tuple(paths), quantize, tokenizer, training, *_classes(base.path, paths))


def _tokenizer(base: Location, paths: Sequence[Path]) -> Tokenizer | None:
    """The base's, or that of the first adapter which brings tokens of its own."""
    own = (path for path in paths if vocabulary_of(path) and (path / "tokenizer.json").is_file())
    return find_tokenizer(next(own, base.name))


def load(options: Options, found: Found | None = None) -> Loaded:
    """The language model of --model and --adapter, which may have been found already.

    Raises:
        ConfigError: it is a classifier.
    """
    found = found or find(options)
    if found.unit is not None:
        raise ConfigError(
            f"{(*adapters(options), found.base.name)[0]}: is a classifier, which `minilora eval` measures"
        )
    model, names = load_with_adapters(options, found)
    assert isinstance(model, Llama)
    return Loaded(model, found.required_tokenizer(), names, found.training)


def load_with_adapters(options: Options, found: Found) -> tuple[Llama | Classifier, tuple[str, ...]]:
    """Load the model that was found, and its adapters, all of them active; return the adapters' names, too."""
    where = found.base.name, options["dtype"], pick_device(options["device"]), found.quantize
    model = load_for(found.unit, found.labels, *where)
    say_quantization(base_held(model), found.adapters)
    grow_vocabulary(model, max(map(vocabulary_of, found.adapters), default=0))
    names = tuple(f"adapter{i}" for i in range(len(found.adapters)))
    for name, path in zip(names, found.adapters, strict=True):
        load_adapter(model, path, name)
    if names:
        set_adapter(model, names)
    return model, names


def _classes(base: Path, paths: Sequence[Path]) -> tuple[Unit | None, tuple[str, ...]]:
    """What adapters, or else the base by itself, give classes to, and the classes.

    Raises:
        ConfigError: the adapters differ in that.
    """
    if not paths:
        config = LlamaConfig.from_dict(read_json(base / "config.json"))
        return config.unit, config.labels
    found = [classes_of(path) for path in paths]
    if len({unit for unit, _ in found}) > 1:
        raise ConfigError(f"{', '.join(map(str, paths))}: are for different tasks; name adapters of one task")
    return found[0]


def _quantize(options: Options, base: Path, paths: Sequence[Path]) -> QuantizeConfig:
    """How the base is to be held: as the flags say; else as in training.

    Raises:
        ConfigError: a flag says how to quantize, and nothing is to be quantized.
    """
    fields = [field.name for field in dataclasses.fields(QuantizeConfig)]
    given = {name: options[name] for name in fields if options[name] is not None}
    recorded = None if options["quantize"] == "none" else recorded_quantization(base, paths)
    config = dataclasses.replace(recorded or QuantizeConfig(), **given)
    if config.quantize == "none" and (idle := [f"--{name.replace('_', '-')}" for name in given if name != "quantize"]):
        raise ConfigError(f"{', '.join(idle)}: without effect; give --quantize nf4, too")
    return config


def recorded_quantization(base: Path, paths: Sequence[Path]) -> QuantizeConfig | None:
    """How the base was held when the first adapter that tells was trained.

    None if no adapter tells, or the base cannot be held so: what a checkpoint's own weights are is not changed for an
    adapter's sake, and fp4 is not made here.
    """
    held = next((held for held in map(base_quantization, paths) if held is not None), None)
    if held is None or held["quantize"] == "fp4" or is_four_bit(read_json(base / "config.json")):
        return None
    names = {field.name for field in dataclasses.fields(QuantizeConfig)}
    return QuantizeConfig(**{name: value for name, value in held.items() if name in names})


def say_quantization(here: Mapping[str, Any], paths: Sequence[Path]) -> None:
    """How the base is held, if it is quantized, and which adapters were trained on one that was held otherwise.

    `here` is what `base_held` says of it.
    """
    if here["quantize"] != "none":
        say(f"the base model is {describe_in_words(here)}")
    for path in paths:
        if not was_trained_on(here, path):
            there = describe_in_words(base_quantization(path) or {})
            say(f"{path}: was trained on a base that is {there}; this one is {describe_in_words(here)}")


def was_trained_on(here: Mapping[str, Any], path: Path) -> bool:
    """Was the base of an adapter held as is said `here`, as far as the adapter tells?"""
    return all(here.get(key) == value for key, value in (base_quantization(path) or {}).items())


def base_of(options: Options) -> str:
    """--model; else what the adapter's file names; else the built-in model."""
    if options["model"] or not adapters(options):
        return options["model"] or BUILTIN
    bases = [base_model_of(adapter) for adapter in adapters(options)]
    if bases[0] is None:
        raise ConfigError(f"{adapters(options)[0]}: names no base model; give --model")
    if any(base != bases[0] for base in bases):
        raise ConfigError(f"the adapters name different base models, {bases}; give --model")
    return bases[0]


@dataclass(frozen=True)
class Training:
    """How an adapter was trained, as far as the files beside it tell; it wants to be asked in the same way.

    `template` is its chat template; with `is_plain` its rows were no conversations; `config` is that of `run.json`.
    """

    template: str | None
    is_plain: bool
    config: Mapping[str, Any]


def how_trained(names: Sequence[str | Path]) -> Training:
    """What lies beside adapters, or a model: directories, or adapters' names. The first that has a file tells.

    Raises:
        FormatError: there is no such adapter, or a file is not what its name says.
    """
    paths = [name if isinstance(name, Path) else fetch(name, "adapter") for name in names]

    def first(name: str) -> Path | None:
        return next((path / name for path in paths if (path / name).is_file()), None)

    template, run = first("chat_template.jinja"), first("run.json")
    values = read_json(run) if run else {}
    config = values.get("config", {})
    if not isinstance(config, dict) or not isinstance(config.get("system"), str | None):
        raise FormatError(f"{run}: config: found {config!r:.60}, need an object, and text as its 'system'")
    return Training(read_text(template) if template else None, values.get("prompts") == "plain", config)


def adapters(options: Options) -> list[str]:
    """--adapter, whether it may be given once or often."""
    given = options["adapter"]
    return given if isinstance(given, list) else [] if given is None else [given]
