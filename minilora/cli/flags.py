"""Command-line flags from data classes: each field is a flag, with the default and the help of the field."""

import argparse
import dataclasses
import json
import tomllib
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from minilora.cli import Parser
from minilora.errors import ConfigError
from minilora.files import publishing, read_json, read_text
from minilora.runs.lock import holds_files, locked
from minilora.runs.settings import FLAG_NAMES, flag

T = TypeVar("T")


def add_fields(parser: Parser, cls: type, title: str, but: Collection[str] = (), unset: str | None = None) -> None:
    """Add a flag for each field of a data class, except those in `but`. A flag that is not given is None.

    Args:
        parser: the parser of a command.
        cls: the data class, whose fields are made by `option`.
        title: the group of the help page for fields that name none.
        but: names of fields to leave out.
        unset: what a flag that is not given means before the field's default does.
    """
    hints = typing.get_type_hints(cls)
    for field in (field for field in dataclasses.fields(cls) if field.name not in but):
        name, kinds = FLAG_NAMES.get(field.name, field.name), _kinds(hints[field.name])
        default = field.default_factory() if callable(field.default_factory) else field.default
        text = " ".join(default) if isinstance(default, tuple) else default
        shown = ", else ".join(filter(None, [unset, "" if text in (None, {}) else str(text)]))
        about = field.metadata["help"] + (f" (default: {shown})" if shown else "")
        options: dict[str, Any] = {"dest": name, "help": about}
        if kinds == (bool,):
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(kinds[0]) is typing.Literal:
            options["metavar"] = f"{{{','.join(typing.get_args(kinds[0]))}}}"  # which the class checks
        elif kinds == (tuple[str, ...],) and default:
            options |= {"nargs": "+", "action": "extend", "metavar": name.upper()}
        else:
            options["type"] = _converter(kinds)
            options["metavar"] = {int: "N", float: "X"}.get(options["type"], name.rpartition("_")[2].upper())
        parser.group(field.metadata.get("group", title)).add_argument(flag(field.name), **options)


def from_flags(cls: type[T], *sources: Mapping[str, Any]) -> T:
    """Return the data class with the values of flags: each field's is that of the first source that has one.

    A field without a value keeps its default. Names in a text are divided, as on the command line; the class checks
    values.
    """
    hints, values = typing.get_type_hints(cls), {}
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]
        name, kinds = FLAG_NAMES.get(field.name, field.name), _kinds(hints[field.name])
        value = next((source[name] for source in sources if source.get(name) is not None), None)
        if value is None:
            continue
        if tuple[str, ...] in kinds and isinstance(value, str):
            value = (value,) if kinds[0] is not str and field.default else _converter(kinds)(value)
        values[field.name] = tuple(value) if kinds == (tuple[str, ...],) and isinstance(value, list) else value
    return cls(**values)


def add_out(parser: argparse.ArgumentParser) -> None:
    """Add --out, the directory that a command writes."""
    parser.add_argument("--out", required=True, type=Path, help="directory to write; it must be new or empty")


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """Lock the output directory and yield a temporary one; its files move to the output if the block succeeds.

    Raises:
        ConfigError: there is anything in it.
        TrainingError: it cannot be written, or another process is at work there.
    """
    with locked(out):
        if holds_files(out):
            raise ConfigError(f"{out}: holds files; give another --out")
        with publishing(out) as directory:
            yield directory


def read_config_file(path: Path) -> dict[str, Any]:
    """Read a flat .toml or .json file of flags and their values.

    Raises:
        FormatError, ConfigError: the file cannot be read.
    """
    if path.suffix == ".json":
        return read_json(path, is_named=True)
    if path.suffix != ".toml":
        raise ConfigError(f"{path}: need a .toml or .json file")
    text = read_text(path, is_named=True)
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not TOML ({error})") from error


def _kinds(hint: Any) -> tuple[Any, ...]:
    """Return the types of a union without None, or the one type."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return tuple(kind for kind in (typing.get_args(hint) if is_union else (hint,)) if kind is not types.NoneType)


def _converter(kinds: tuple[Any, ...]) -> Callable[[str], Any]:
    """Return the function that converts the text of a flag to a value of one of these types."""
    if bool in kinds:
        return lambda text: {"true": True, "false": False}.get(text.lower(), text)
    if Mapping[str, str] in kinds:
        return _parse_pairs
    if tuple[str, ...] in kinds:
        return _names_or_pattern if str in kinds else _split_names
    if len(kinds) == 1 and kinds[0] in (str, int, float):
        return kinds[0]
    return _numbers_or_object


def _numbers_or_object(text: str) -> Any:
    """Return numbers joined with commas as a list, or a JSON object."""
    try:
        return json.loads(text if text.lstrip().startswith("{") else f"[{text}]")
    except (ValueError, RecursionError) as error:
        need = "numbers joined with commas, or a JSON object"
        raise argparse.ArgumentTypeError(f"found {text!r:.80}, need {need}") from error


def _names_or_pattern(text: str) -> str | tuple[str, ...]:
    """Return `q_proj,v_proj` as a list of names, and text with other characters, such as `all-linear`, unchanged."""
    is_list = all(character.isalnum() or character in "_., " for character in text)
    return _split_names(text) if is_list else text


def _parse_pairs(text: str) -> Any:
    """Return `prompt=question,completion=answer`, or a JSON object, as a dictionary."""
    if text.startswith("{"):
        return _numbers_or_object(text)
    pairs = [name.partition("=") for name in _split_names(text)]
    if not all(name and value for name, _, value in pairs):
        raise argparse.ArgumentTypeError(f"found {text!r:.80}, need name=column, joined with commas")
    return {name: value for name, _, value in pairs}


def _split_names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(","))
