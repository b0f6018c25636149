"""What a command is, and the flags that several of them share."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from minilora.errors import ConfigError, FormatError
from minilora.hub import fetch
from minilora.lora.attach import set_adapter
from minilora.lora.files import base_model_of, load_adapter
from minilora.model.checkpoint import load_model
from minilora.model.llama import Llama
from minilora.model.tokenizer import Tokenizer, load_tokenizer
from minilora.run import pick_device
from minilora.storage import BUILTIN, read_text

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
    """A flag spelled with dashes; `parse` turns underscores into them."""
    parser.add_argument(f"--{name.replace('_', '-')}", **options)


def add_model_flags(parser: argparse.ArgumentParser, many_adapters: bool = False) -> None:
    """--model, --adapter, --dtype and --device."""
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


def load(options: Options) -> tuple[Llama, Tokenizer]:
    """The model of --model and --adapter, all adapters active, and its tokenizer.

    Where an adapter was trained with a chat template that lies beside it, the model is asked by that one.
    """
    base = base_of(options)
    try:
        model = load_model(base, options["dtype"], pick_device(options["device"]))
    except FormatError as error:
        raise FormatError(f"{error}{_whose(options)}") from error
    names = []
    for i, path in enumerate(adapters(options)):
        names.append(f"adapter{i}")
        load_adapter(model, path, name=names[-1])
    if names:
        set_adapter(model, names)
    return model, _with_template_of(adapters(options), load_tokenizer(base))


def _with_template_of(paths: Sequence[str], tokenizer: Tokenizer) -> Tokenizer:
    templates = [fetch(path, "adapter") / "chat_template.jinja" for path in paths]
    found = next((template for template in templates if template.is_file()), None)
    return tokenizer.with_template(read_text(found)) if found else tokenizer


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


def _whose(options: Options) -> str:
    """Who named a base model that cannot be loaded, if not the user."""
    if options["model"] or not adapters(options):
        return ""
    return f" (the adapter {adapters(options)[0]} names it as its base model; --model names another)"


def adapters(options: Options) -> list[str]:
    """--adapter, whether it may be given once or often."""
    given = options["adapter"] or []
    return given if isinstance(given, list) else [given]


def say(text: str) -> None:
    """What the user should know but no other program wants to read."""
    print(text, file=sys.stderr, flush=True)
