"""A `tokenizer.json` as it is to be used, and panics of the tokenizers package, which reads it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from minilora.errors import FormatError
from minilora.files import parse_object

TOKENIZER_VALUES = 10**7  # in a tokenizer.json; that of 262,144 tokens has 2.4 million


@contextmanager
def no_panic(where: str) -> Iterator[None]:
    """Raise a `FormatError` for what the package raises: an `Exception` itself, or a panic, which is none."""
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise FormatError(f"{where}: {error}") from error


def untrimmed(source: str, where: str) -> str:
    """Return a tokenizer.json without truncation and padding, and whose offsets keep white space; ids do not change.

    Raises:
        FormatError: it is no JSON object; `where` is named.
    """
    data = parse_object(source, where, TOKENIZER_VALUES)
    pending: list[Any] = [data.get("pre_tokenizer"), data.get("post_processor")]
    while pending:  # processors may hold others
        node = pending.pop()
        if isinstance(node, dict) and "trim_offsets" in node:
            node["trim_offsets"] = False
        pending += node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return json.dumps({**data, "truncation": None, "padding": None})
