"""A `tokenizer.json` as it is to be used, and panics of the tokenizers package, which reads it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

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
    processors = {name: data.get(name) for name in ("pre_tokenizer", "post_processor")}
    text = json.dumps(processors).replace('"trim_offsets": true', '"trim_offsets": false')
    return json.dumps({**data, **json.loads(text), "truncation": None, "padding": None})
