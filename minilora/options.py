"""Options, fields of a data class that are flags of the command line: declared, documented and checked."""

import functools
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import field, fields
from typing import Any, TypeVar

from minilora.errors import ConfigError

C = TypeVar("C", bound=type)
WORDS = {  # of types, singular and plural
    str: ("text", "texts"),
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    bool: ("true or false", "true or false"),
    types.NoneType: ("None", "None"),
}
FLOAT = 1e30  # the largest number that is not whole


def option(default: Any, help: str, group: str | None = None) -> Any:
    """A field that is a flag, with its help, and the group of the help page that it is in if not in its class's."""
    given: Any = {"default_factory": dict} if default is dict else {"default": default}
    return field(**given, metadata={"help": help} | ({"group": group} if group else {}))


def document_fields(cls: C) -> C:
    """Add the help of each field to the docstring of a data class whose fields are options."""
    lines = (f"{entry.name}: {entry.metadata['help']}" for entry in fields(cls))
    helps = [textwrap.fill(line, 112, initial_indent=" " * 4, subsequent_indent=" " * 8) for line in lines]
    cls.__doc__ = "\n".join([inspect.cleandoc(str(cls.__doc__)), "", "Attributes:", *helps])
    return cls


def reject_foreign_kwargs(**advice: str) -> Callable[[C], C]:
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


def check_types(config: object) -> None:
    """Raise a `ConfigError` that names each field of a data class whose value does not fit its annotation."""
    hints = typing.get_type_hints(type(config))
    bad = [(name, value) for name, value in vars(config).items() if not fits(value, hints[name])]
    if bad:
        wrong = (f"{name} is {value!r:.80}, need {in_words(hints[name])}" for name, value in bad)
        raise ConfigError(f"{type(config).__name__}: {'; '.join(wrong)}")


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
    if origin is Mapping and isinstance(value, Mapping):
        return all(fits(key, parts[0]) and fits(element, parts[1]) for key, element in value.items())
    kind = {float: (int, float)}.get(hint, origin or hint)
    return isinstance(value, kind) and (hint is bool or not isinstance(value, bool))


def is_positive(value: Any) -> bool:
    """Return whether a value is a number above 0 that float32 can hold, and no bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= FLOAT


def in_words(hint: Any, is_plural: bool = False) -> str:
    """Return an annotated type in words for a message, without Python's names."""
    if typing.get_origin(hint) is typing.Literal:
        return f"one of {list(typing.get_args(hint))}"
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(map(in_words, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        return ("lists of " if is_plural else "a list of ") + in_words(typing.get_args(hint)[0], is_plural=True)
    if typing.get_origin(hint) is Mapping:
        return f"names with {in_words(typing.get_args(hint)[1], is_plural=True)}"
    other = re.sub(r"<class '|'>|\w+\.(?=\w)", "", str(hint))
    return WORDS.get(hint, (other, other))[is_plural]
