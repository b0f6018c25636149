"""Errors: one family of exceptions, whose messages name file, key, what was found and what is accepted.

Options, fields of a data class that are flags of the command line, are declared, documented and checked here too.
"""

from __future__ import annotations

import functools
import inspect
import re
import textwrap
import types
import typing
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field, fields
from pathlib import Path
from typing import Any, TypeVar

C = TypeVar("C", bound=type)


class MiniloraError(Exception):
    """Every error that minilora raises on purpose. Its text has no control characters: it may quote a file."""

    def __str__(self) -> str:
        return printable(super().__str__())


class ConfigError(MiniloraError, ValueError):
    """An option has a value that cannot work."""


class FormatError(MiniloraError, ValueError):
    """A file does not hold what its format promises."""


class DataError(MiniloraError, ValueError):
    """A row of training or evaluation data cannot be used."""


class TargetError(MiniloraError, ValueError):
    """A module or an adapter was named that does not exist."""


class ShapeError(MiniloraError, ValueError):
    """Tensors do not fit together."""


class TrainingError(MiniloraError, RuntimeError):
    """A run or a computation cannot go on.

    A number is not finite, a directory or checkpoint belongs to another run, nothing can be trained, or another process
    or thread is at work.
    """


def printable(text: str) -> str:
    """Escape control characters, which a terminal would act on, except newlines and tabs; spaces of any width stay.

    >>> printable("a\\x1b[2J")
    'a\\\\x1b[2J'
    """

    def is_shown(c: str) -> bool:
        return c.isprintable() or c in "\n\t" or unicodedata.category(c) == "Zs"

    return "".join(c if is_shown(c) else c.encode("unicode_escape").decode() for c in text)


def listed(problems: Sequence[str], most: int = 10) -> str:
    """Return problems, the first of them, as lines that follow a message."""
    more = [f"… and {len(problems) - most} more"] if len(problems) > most else []
    return "".join(f"\n  {problem:.300}" for problem in [*problems[:most], *more])


def in_recipe(name: str) -> str:
    """Return where a feature that is a recipe is found, for the end of a message."""
    return f"it is a recipe: see recipes/{name}.py in minilora's repository"


def check_types(owner: Any, values: Mapping[str, object]) -> None:
    """Raise a `ConfigError` that names each value which does not fit its annotation.

    Args:
        owner: the function or data class with the annotations.
        values: its arguments or fields, such as `locals()` in the function's first line.
    """
    hints = typing.get_type_hints(owner)
    bad = [(name, value) for name, value in values.items() if not fits(value, hints[name])]
    if bad:
        wrong = (f"{name} is {value!r:.80}, need {in_words(hints[name])}" for name, value in bad)
        raise ConfigError(f"{owner.__name__}: {'; '.join(wrong)}")


def check_utf8(what: str, *values: object) -> None:
    """Raise a `ConfigError` if one of the values is text or a path that cannot be written in UTF-8.

    Names of files that are in another encoding have lone surrogates in Python, which neither JSON nor safetensors take.
    """
    for value in values:
        if isinstance(value, str | Path) and re.search("[\ud800-\udfff]", str(value)):
            raise ConfigError(
                f"{what} is {str(value)!r:.300}, which is not UTF-8; rename the file, or convert the text"
            )


def answers(**advice: str) -> Callable[[C], C]:
    """Decorate a class so that keyword arguments of other libraries raise a `TypeError` with advice."""

    def decorate(cls: C) -> C:
        init = cls.__init__  # type: ignore[misc]

        @functools.wraps(init)
        def checked(self: Any, *args: Any, **kwargs: Any) -> None:
            if foreign := sorted(kwargs.keys() & advice.keys()):
                raise TypeError(f"{cls.__name__} has " + "; ".join(f"no {name!r}: {advice[name]}" for name in foreign))
            init(self, *args, **kwargs)

        cls.__init__ = checked  # type: ignore[misc]
        return cls

    return decorate


def fits(value: object, hint: Any) -> bool:
    """Return whether a value is of the annotated type: any collection for a tuple, a whole number for a float."""
    origin = typing.get_origin(hint)
    parts = typing.get_args(hint)
    if hint is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, part) for part in parts)
    if origin is typing.Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    if origin is tuple:
        return isinstance(value, list | tuple | set | frozenset) and all(fits(element, parts[0]) for element in value)
    if origin is Sequence and isinstance(value, list | tuple):
        return all(fits(element, parts[0]) for element in value)
    if origin is Mapping and isinstance(value, Mapping):
        return all(fits(key, parts[0]) and fits(element, parts[1]) for key, element in value.items())
    kind = {float: (int, float)}.get(hint, origin or hint)
    return isinstance(value, kind) and (hint is bool or not isinstance(value, bool))


def in_words(hint: Any) -> str:
    """Return the name of an annotated type for a message."""
    if typing.get_origin(hint) is typing.Literal:
        return f"one of {list(typing.get_args(hint))}"
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(map(in_words, typing.get_args(hint)))
    return "None" if hint is types.NoneType else re.sub(r"<class '|'>|\w+\.(?=\w)", "", str(hint))


def option(default: Any, help: str, group: str | None = None) -> Any:
    """A field that is a flag, with its help, and the group of the help page that it stands in if not in its class's."""
    given: Any = {"default_factory": dict} if default is dict else {"default": default}
    return field(**given, metadata={"help": help} | ({"group": group} if group else {}))


def document_fields(cls: C) -> C:
    """Add the help of each field to the docstring of a data class whose fields are options."""
    lines = (f"{each.name}: {each.metadata['help']}" for each in fields(cls))
    helps = [textwrap.fill(line, 112, initial_indent=" " * 4, subsequent_indent=" " * 8) for line in lines]
    cls.__doc__ = "\n".join([inspect.cleandoc(str(cls.__doc__)), "", "Attributes:", *helps])
    return cls
