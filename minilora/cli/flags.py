"""Command-line flags from data classes: each field is a flag, with the default and the help of the field."""

import argparse
import dataclasses
import json
import re
import tomllib
import types
import typing
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from minilora.cli import Parser, address_of
from minilora.errors import ConfigError
from minilora.files import publishing, read_json, read_text
from minilora.runs.lock import holds_files, locked
from minilora.runs.settings import FLAG_NAMES, flag

T = TypeVar("T")


def add_fields(parser: Parser, cls: type, title: str, but: Collection[str] = (), unset: str | None = None) -> None:
    """Add a flag for each field of a data class, except those in `but`. A flag that is not given is None.

    The class makes its fields by `option`; those that name no group of the help page are under `title`. `unset` is what
    a flag that is not given means before the field's default does.
    """
    hints = typing.get_type_hints(cls)
    for field in (field for field in dataclasses.fields(cls) if field.name not in but):
        name, kinds = FLAG_NAMES.get(field.name, field.name), _kinds(hints[field.name])
        default = field.default_factory() if callable(field.default_factory) else field.default
        text = " ".join(default) if isinstance(default, tuple) else default
        shown = ", else ".join(filter(None, [unset, "" if text in (None, {}) else str(text)]))
        about = re.sub(r"\w+_\w+", lambda word: flag(word[0]) if word[0] in hints else word[0], field.metadata["help"])
        about += f" (default: {shown})" if shown else ""
        options: dict[str, Any] = {"dest": name, "help": about}
        if kinds == (bool,):
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(kinds[0]) is typing.Literal:
            options["metavar"] = f"{{{','.join(typing.get_args(kinds[0]))}}}"  # which the class checks
        elif kinds == (tuple[str, ...],) and default:
            options |= {"nargs": "+", "action": "extend", "metavar": name.upper()}
        else:
            options["type"] = kinds[0] if kinds in ((str,), (int,), (float,)) else partial(_parse, kinds)
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
            value = (value,) if kinds[0] is not str and field.default else _parse(kinds, value)
        values[field.name] = tuple(value) if kinds == (tuple[str, ...],) and isinstance(value, list) else value
    return cls(**values)


def add_out(parser: argparse.ArgumentParser) -> None:
    """Add --out, the directory that a command writes."""
    parser.add_argument("--out", required=True, type=Path, help="directory to write; it must be new or empty")


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """Lock the output directory and yield a temporary one; its files move to the output if the block succeeds."""
    with locked(out):
        if holds_files(out):
            raise ConfigError(f"{out}: holds files; give another --out")
        with publishing(out) as directory:
            yield directory


def read_config_file(path: Path) -> dict[str, Any]:
    """Read a flat .toml or .json file of flags and their values."""
    if path.suffix == ".json":
        return read_json(path, is_named=True)
    if path.suffix != ".toml":
        raise ConfigError(
            f"{path}: --config reads .toml or .json; see {address_of('migration.md#flags')} for keys of others"
        )
    text = read_text(path, is_named=True)
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not TOML ({error})") from error


def _kinds(hint: Any) -> tuple[Any, ...]:
    """Return the types of a union without None, or the one type."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return tuple(kind for kind in (typing.get_args(hint) if is_union else (hint,)) if kind is not types.NoneType)


def _parse(kinds: tuple[Any, ...], text: str) -> Any:
    """Return the value of a flag's text: a list joined with commas, names with columns, or a JSON object.

    Text that may be a pattern is a list of names only if it has no other characters, as `q_proj,v_proj`.
    """
    if bool in kinds:
        return {"true": True, "false": False}.get(text.lower(), text)
    names = tuple(part.strip() for part in text.split(","))
    if tuple[str, ...] in kinds:
        is_pattern = str in kinds and not all(character.isalnum() or character in "_., " for character in text)
        return text if is_pattern else names
    if Mapping[str, str] in kinds and not text.startswith("{"):
        pairs = [name.partition("=") for name in names]
        if not all(name and value for name, _, value in pairs):
            raise argparse.ArgumentTypeError(f"found {text!r:.80}, need name=column, joined with commas")
        return {name: value for name, _, value in pairs}
    try:
        return json.loads(text if text.lstrip().startswith("{") else f"[{text}]")
    except (ValueError, RecursionError) as error:
        need = "numbers joined with commas, or a JSON object"
        raise argparse.ArgumentTypeError(f"found {text!r:.80}, need {need}") from error
