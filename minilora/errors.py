"""Errors: one family of exceptions, whose messages name file, key, what was found and what is accepted."""

import unicodedata
from collections.abc import Sequence


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
    is_shown = (c.isprintable() or c in "\n\t" or unicodedata.category(c) == "Zs" for c in text)
    return "".join(c if shown else c.encode("unicode_escape").decode() for c, shown in zip(text, is_shown, strict=True))


def listed(problems: Sequence[str], most: int = 10) -> str:
    """Return problems, the first of them, as lines that follow a message."""
    more = [f"… and {len(problems) - most} more"] if len(problems) > most else []
    return "".join(f"\n  {problem:.300}" for problem in [*problems[:most], *more])


def in_recipe(name: str) -> str:
    """Return where a feature that is a recipe is found, for the end of a message."""
    return f"it is a recipe: see recipes/{name}.py in minilora's repository"
