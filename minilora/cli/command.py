"""What a command is, and the flags that several of them share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minilora.errors import ConfigError
from minilora.lora.attach import set_adapter
from minilora.lora.files import CONFIG_FILE, load_adapter
from minilora.model.checkpoint import load_model
from minilora.model.llama import Llama
from minilora.model.tokenizer import Tokenizer, load_tokenizer
from minilora.run import pick_device
from minilora.storage import BUILTIN, read_json

Options = dict[str, Any]  # the parsed flags of a command line


@dataclass(frozen=True)
class Command:
    """One command: `run` carries it out and returns the exit status.

    `help` is its line in the list of commands, `about` begins its own page, `example` is a command line that works.
    """

    name: str
    help: str
    about: str
    example: str
    add_flags: Callable[[argparse.ArgumentParser], None]
    run: Callable[[Options], int]


def add_dashed(parser: argparse._ActionsContainer, name: str, **options: Any) -> None:
    """A flag that can be spelled with dashes or underscores."""
    parser.add_argument(*dict.fromkeys((f"--{name.replace('_', '-')}", f"--{name}")), **options)


def add_model_flags(parser: argparse.ArgumentParser, many_adapters: bool = False) -> None:
    """--model, --adapter, --dtype and --device."""
    group = parser.add_argument_group("model and device")
    group.add_argument(
        "--model",
        help="directory of the base model (default: the one the adapter was made for, else the built-in one)",
    )
    action, more = ("append", "; give it again for more") if many_adapters else ("store", "")
    group.add_argument("--adapter", action=action, help=f"directory of an adapter{more}")
    group.add_argument(
        "--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="number format (default: auto)"
    )
    group.add_argument("--device", default="auto", help="cpu, cuda, mps; auto: the best there is (default: auto)")


def load(options: Options) -> tuple[Llama, Tokenizer]:
    """The model of --model and --adapter, all adapters active, and its tokenizer."""
    base = base_of(options)
    if not options["model"] and adapters(options) and base != BUILTIN and not Path(base).is_dir():
        raise ConfigError(f"{base}: no such directory, but the adapter names it as its base model; give --model")
    model = load_model(base, options["dtype"], pick_device(options["device"]))
    names = []
    for i, path in enumerate(adapters(options)):
        names.append(f"adapter{i}")
        load_adapter(model, path, name=names[-1])
    if names:
        set_adapter(model, names)
    return model, load_tokenizer(base)


def base_of(options: Options) -> str:
    """--model; else what the adapter's file names; else the built-in model."""
    if options["model"] or not adapters(options):
        return options["model"] or BUILTIN
    paths = [Path(adapter) / CONFIG_FILE for adapter in adapters(options)]
    bases = [read_json(path).get("base_model_name_or_path") for path in paths]
    if not isinstance(bases[0], str) or not bases[0]:
        raise ConfigError(f"{paths[0]}: names no base model; give --model")
    if any(base != bases[0] for base in bases):
        raise ConfigError(f"the adapters name different base models, {bases}; give --model")
    return bases[0]


def adapters(options: Options) -> list[str]:
    """--adapter, whether it may be given once or often."""
    given = options["adapter"] or []
    return given if isinstance(given, list) else [given]


def say(text: str) -> None:
    """What the user should know but no other program wants to read."""
    print(text, file=sys.stderr, flush=True)
