"""Find and load the model and the adapters that --model and --adapter name."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from minilora.adapters.files import load_adapter
from minilora.adapters.layout import WEIGHTS_FILE, base_model_of, base_quantization, tokenizer_of
from minilora.cli import Options, Parser, say
from minilora.cli.flags import add_fields, from_flags
from minilora.cli.messages import base_notes
from minilora.errors import ConfigError, FormatError
from minilora.files import BUILTIN, read_json, sha256_of
from minilora.llama import Llama
from minilora.models.bitsandbytes import QuantizeConfig, describe_quantization, is_four_bit
from minilora.models.checkpoint import load_model, usable_device
from minilora.models.hub import Location, locate
from minilora.models.tokenizer import Tokenizer, load_tokenizer
from minilora.runs.settings import DEVICE_HELP, DTYPE_HELP

MERGED = "merged_adapters"  # in config.json: the adapters that `minilora merge` has merged into the model
ADAPTER_HELP = "directory of an adapter, or org/name[@revision] on the Hugging Face Hub"
THINKING: dict[str, Any] = {  # the flag --thinking of several commands
    "action": argparse.BooleanOptionalAction,
    "help": "ask a model such as Qwen 3 for answers with or without thoughts (default: as in training, otherwise as "
    "the chat template does)",
}


def add_model_flags(parser: Parser, more: str = "", dtype: str = DTYPE_HELP) -> None:
    """Add --model, --adapter with `more` help, --dtype with its help, --device and the flags of quantization."""
    group = parser.group("model and device")
    group.add_argument(
        "--model",
        help="directory of the base model, or org/name[@revision] on the Hugging Face Hub "
        "(default: the base model that the adapter names, or the built-in model)",
    )
    group.add_argument("--adapter", action="append", default=[], help=f"{ADAPTER_HELP}{more}")
    dtypes = ("auto", "float32", "bfloat16")
    group.add_argument("--dtype", default="auto", choices=dtypes, help=f"{dtype} (default: auto)")
    group.add_argument("--device", default="auto", help=f"{DEVICE_HELP} (default: auto)")
    add_fields(parser, QuantizeConfig, "model and device", unset="as in the adapter's training")


def thinking_of(options: Options, tokenizer: Tokenizer) -> bool | None:
    """Return whether to ask for thoughts, by the flag, or else as in the training; None leaves it to the template."""
    if options["thinking"] is None:
        return tokenizer.prompts.thinking
    if tokenizer.template is None or not tokenizer.template.has_thinking:
        raise ConfigError(
            "--thinking and --no-thinking need a chat template that can ask for answers with and without thoughts"
        )
    return options["thinking"]


@dataclass(frozen=True)
class Sources:
    """The model and the adapters that the flags name, and how to load them."""

    base: Location
    adapters: tuple[Path, ...]
    quantize: QuantizeConfig
    tokenizer: Tokenizer | None  # None if the model has none; it can be merged without


def find_sources(options: Options) -> Sources:
    """Find the model and the adapters that the flags name, and download them if necessary."""
    paths = tuple(locate(name, "adapter").path for name in options["adapter"])
    name = base_of(options["model"], paths)
    try:
        base = locate(name, "model")
    except FormatError as error:
        if options["model"] or not paths:
            raise
        note = f"the adapter {options['adapter'][0]} names it as its base model; give its place by --model"
        raise FormatError(f"{error} ({note})") from error
    recorded = {} if options["quantize"] == "none" else recorded_quantization(base.path, paths)
    return Sources(base, paths, from_flags(QuantizeConfig, options, recorded), tokenizer_of(base.name, paths))


def load(options: Options) -> tuple[Llama, Tokenizer]:
    """Find and load the model and its adapter, if one is named, and return it with its tokenizer."""
    found = find_sources(options)
    if len(found.adapters) > 1:
        raise ConfigError("give one --adapter; `minilora merge` merges several into one model")
    check_not_merged(found.base, found.adapters)
    tokenizer = found.tokenizer or load_tokenizer(found.base.name)
    model = load_model(found.base.name, options["dtype"], usable_device(options["device"]), found.quantize)
    for path in found.adapters:
        load_adapter(model, path)
    for note in base_notes(found.base, found.adapters, describe_quantization(model)):
        say(note)
    return model, tokenizer


def base_of(model: str | None, adapters: Sequence[Path]) -> str:
    """Return --model if it is given, otherwise the model that the adapters name, or the built-in one."""
    if model is not None or not adapters:
        return BUILTIN if model is None else model
    bases = [base_model_of(adapter) for adapter in adapters]
    if bases[0] is None:
        raise ConfigError(f"{adapters[0]}: names no base model; give --model")
    if any(base != bases[0] for base in bases):
        raise ConfigError(f"the adapters name different base models, {bases}; give --model")
    return bases[0]


def recorded_quantization(base: Path, adapters: Sequence[Path]) -> dict[str, Any]:
    """Return how the base was quantized in training, by the names of the flags, as the first adapter records it.

    Empty if none does, if it was fp4, which is read but not made here, or if the base is a 4-bit checkpoint.
    """
    recorded = next(filter(None, map(base_quantization, adapters)), {})
    if recorded.get("quantize") == "fp4" or is_four_bit(read_json(base / "config.json")):
        return {}
    return {field.name: recorded[field.name] for field in fields(QuantizeConfig) if field.name in recorded}


def check_not_merged(base: Location, adapters: Sequence[Path]) -> None:
    """Raise a `ConfigError` if one of the adapters is merged into the model already."""
    merged = read_json(base.path / "config.json").get(MERGED)
    for path in adapters if merged else ():
        if sha256_of(path / WEIGHTS_FILE) in str(merged):
            raise ConfigError(
                f"{path}: is merged into {base.name} already ({MERGED} of its config.json); leave out --adapter, "
                "or give the base model as --model"
            )


def run_settings(options: Options) -> dict[str, Any]:
    """Return the settings of the run that made the adapter; empty if there is none."""
    paths = (locate(name, "adapter").path / "run.json" for name in options["adapter"])
    config = next((read_json(path).get("config") for path in paths if path.exists()), None)
    return config if isinstance(config, dict) else {}
