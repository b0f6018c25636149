"""Command-line flags out of data classes: a field is a flag, its default and help are the field's own."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import tomllib
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from minilora.errors import ConfigError
from minilora.storage import read_json, read_text

T = TypeVar("T")
RENAMED = {"r": "lora_r"}  # as everywhere in the field


def add_flags(parser: argparse.ArgumentParser, cls: type, title: str) -> None:
    """One flag for each field of a data class, spelled with dashes or underscores."""
    group = parser.add_argument_group(title)
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        name = RENAMED.get(field.name, field.name)
        spellings = list(dict.fromkeys((f"--{name.replace('_', '-')}", f"--{name}")))
        default = field.default_factory() if callable(field.default_factory) else field.default
        shown = "" if default in (None, (), {}) else f" (default: {default})"
        options: dict[str, Any] = {"dest": name, "default": default, "help": field.metadata["help"] + shown}
        if hints[field.name] is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif typing.get_origin(hints[field.name]) is typing.Literal:
            options["choices"] = typing.get_args(hints[field.name])
        else:
            options["type"] = _converter(hints[field.name])
            options["metavar"] = name.rpartition("_")[2].upper()
        group.add_argument(*spellings, **options)


def from_flags(cls: type[T], values: Mapping[str, Any]) -> T:
    """The data class that the parsed flags describe.

    Raises:
        ConfigError: a value from a configuration file has the wrong type; all of them in one message.
    """
    names = {field.name: RENAMED.get(field.name, field.name) for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    bad = [
        f"{names[name]} is {values[names[name]]!r}, need {getattr(hint, '__name__', hint)}"
        for name, hint in typing.get_type_hints(cls).items()
        if not _fits(values[names[name]], hint)
    ]
    if bad:
        raise ConfigError("; ".join(bad))
    return cls(**{name: values[flag] for name, flag in names.items()})


def use_config(parser: argparse.ArgumentParser, values: Mapping[str, Any], source: str) -> None:
    """Make the values of a configuration the flags' defaults, so that flags on the command line go on top.

    Raises:
        ConfigError: a key that is no flag; the nearest right one is named.
    """
    known = {action.dest for action in parser._actions if action.dest not in ("help", "config")}
    for key in values:
        name = key.replace("-", "_")
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            raise ConfigError(
                f"{source}: key {key!r} is unknown" + (f"; did you mean {nearest[0]!r}?" if nearest else "")
            )
    parser.set_defaults(**{key.replace("-", "_"): value for key, value in values.items()})


def read_config(path: Path) -> dict[str, Any]:
    """A flat .toml or .json file of flag names and values.

    Raises:
        FormatError, ConfigError: the file cannot be read.
    """
    if path.suffix != ".toml":
        return read_json(path)
    try:
        return tomllib.loads(read_text(path))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not TOML ({error})") from error


def _fits(value: Any, hint: Any) -> bool:
    """Is the value of this type? A list may stand for a tuple, and a whole number for a float."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is typing.Literal:
        return value in parts
    if origin is tuple:
        return isinstance(value, list | tuple) and all(_fits(element, parts[0]) for element in value)
    kind = {float: (int, float)}.get(hint, origin or hint)
    return isinstance(value, kind) and (hint is bool or not isinstance(value, bool))


def _converter(hint: Any) -> Callable[[str], Any]:
    """How the text of a flag becomes a value of this type."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    kinds = [kind for kind in (typing.get_args(hint) if is_union else (hint,)) if kind is not types.NoneType]
    if bool in kinds:
        return _truth_or_text
    if typing.get_origin(kinds[0]) is Mapping:
        return _json_object
    if any(typing.get_origin(kind) is tuple for kind in kinds):
        element = int if kinds == [tuple[int, ...]] else str
        return _names_or_pattern if str in kinds else lambda text: tuple(element(part) for part in text.split(","))
    return kinds[0]


def _truth_or_text(text: str) -> bool | str:
    return {"true": True, "false": False}.get(text.lower(), text)


def _json_object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"found {text}, need a JSON object")
    return value


def _names_or_pattern(text: str) -> str | tuple[str, ...]:
    """`q_proj,v_proj` is a list of names; `all-linear` and anything with other characters is one string."""
    is_list = text != "all-linear" and all(character.isalnum() or character in "_., " for character in text)
    return tuple(part.strip() for part in text.split(",")) if is_list else text
