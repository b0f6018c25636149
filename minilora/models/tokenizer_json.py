"""Check a `tokenizer.json` before the tokenizers package reads it.

The package allocates what a file states, which ends the process where it fails, and panics at what it does not expect.
So the file is read as JSON first, and what would take more memory or time than the text and the file call for is
refused. A panic becomes a `FormatError`.

Two things cannot be bounded from outside: a regular expression of a file may take time that grows with the square or
the cube of a text's length, and a file of 100 MB takes ten times as much memory.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from minilora.errors import FormatError, listed
from minilora.storage import TOKENIZER_VALUES, parse_json

PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
TEXTS = ("content", "prepend", "Regex", "precompiled_charsmap")  # keys in them
PART_VALUES = 512  # of these four, together; that of Llama 3 has 90
GAP = 2**20  # ids that a vocabulary may leave out: the package keeps a list up to the largest
TIMES = 256  # as long as before, at most, a text may become by normalization
WORD, TOKEN = 256, 256  # the longest word of WordPiece, whose time is its square; the longest token of Unigram
UNMATCHED = re.compile(r"\\.|\[(?:\\.|[^\]])*\]", re.DOTALL)  # escapes and classes
GROUP, VARIES = re.compile(r"\(([^()]*)\)"), re.compile(r"[*+|]|\{\d*,")
EXPLOSIVE = re.compile(r"\([^()]*(?:[*+|]|\{\d*,)[^()]*\)(?:[*+]|\{\d*,)")  # (a+)+ and (a|aa)*


@contextmanager
def no_panic(where: str) -> Iterator[None]:
    """Raise a `FormatError` for what the package raises: an `Exception` itself, or a panic, which is none."""
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        raise FormatError(f"{where}: {error}") from error


def checked(source: str, where: str) -> str:
    """Return a tokenizer.json as it is to be used, without truncation and padding.

    Offsets keep the white space that some tokenizers trim off; the ids do not change.

    Raises:
        FormatError: it is not JSON, or asks for what the limits of this page refuse; `where` is named.
    """
    data = parse_json(source, where, TOKENIZER_VALUES)
    if not isinstance(data, dict) or not isinstance(data.get("model"), dict):
        raise FormatError(f"{where}: need an object with the key 'model'")
    nodes = [node for part in PARTS for node in _nodes(data.get(part))]
    if bad := [*_bad_tokens(data), *_bad_parts([node for node in nodes if isinstance(node, dict)], len(nodes))]:
        raise FormatError(f"{where}: cannot be used:{listed(bad)}")
    for node in nodes:
        if isinstance(node, dict) and "trim_offsets" in node:
            node["trim_offsets"] = False
    return json.dumps({**data, "truncation": None, "padding": None})


def _nodes(value: Any) -> Iterator[Any]:
    """Yield a value and all values in it."""
    pending = [value]
    while pending:
        yield (each := pending.pop())
        pending += each.values() if isinstance(each, dict) else each if isinstance(each, list) else ()


def _bad_tokens(data: dict[str, Any]) -> Iterator[str]:
    model, added = data["model"], data.get("added_tokens") or []
    vocabulary = model.get("vocab")
    is_text = isinstance(added, list) and all(isinstance(each, dict) and each.get("content") for each in added)
    if not is_text or not isinstance(vocabulary, dict | list):
        yield "added_tokens: need objects with a content; model.vocab: need an object or a list"
        return
    ids = [*(vocabulary.values() if isinstance(vocabulary, dict) else ()), *(each.get("id") for each in added)]
    most = len(vocabulary) + len(added) + GAP
    if strange := [each for each in ids if type(each) is not int or not 0 <= each < most]:
        yield f"id {strange[0]!r:.80}: need whole numbers from 0, below {most} for so many tokens"
    if isinstance(limit := model.get("max_input_chars_per_word"), int) and limit > WORD:
        yield f"model.max_input_chars_per_word: found {limit!r:.80}, need at most {WORD}"
    pairs = vocabulary if isinstance(vocabulary, list) else []
    if any(isinstance(pair, list) and len(str(pair[:1])) > TOKEN for pair in pairs):
        yield f"model.vocab: a token has more than {TOKEN} characters"


def _bad_parts(nodes: list[dict[str, Any]], count: int) -> Iterator[str]:
    if count > PART_VALUES:
        yield f"{', '.join(PARTS)}: have {count:,} values, need at most {PART_VALUES:,}"
        return
    texts = {key: [node[key] for node in nodes if isinstance(node.get(key), str)] for key in TEXTS}
    growth = math.prod(max(1, len(text)) for text in texts["content"]) + sum(map(len, texts["prepend"]))
    if growth > TIMES:
        yield f"content, prepend: make a text up to {growth:,} times longer, need at most {TIMES}"
    if slow := [pattern for pattern in texts["Regex"] if is_explosive(pattern)]:
        yield f"Regex: {slow[0]!r:.80} repeats a group that can match the same in several ways"
    for table in texts["precompiled_charsmap"]:
        try:
            size = int.from_bytes(base64.b64decode(table[:8])[:4], "little")  # of what follows, in bytes
        except (binascii.Error, ValueError):
            size = 0  # the package says what is wrong
        if size > len(table):
            yield f"precompiled_charsmap: states {size:,} bytes and has {len(table) * 3 // 4:,}"
    for single in (node["single"] for node in nodes if isinstance(node.get("single"), list)):
        if sum(isinstance(piece, dict) and "Sequence" in piece for piece in single) > 1:
            yield "post_processor.single: repeats the text"


def is_explosive(pattern: str) -> bool:
    """Return whether a regular expression repeats a group that holds a repetition or alternatives.

    >>> is_explosive(r"(a+)+$"), is_explosive(r"((a|b)c)*"), is_explosive(r"'(?:s|t)|\\p{L}+|[^(a+)+]?\\s+(?!\\S)")
    (True, True, False)
    """
    text, before = UNMATCHED.sub("x", pattern), ""
    while text != before:
        if EXPLOSIVE.search(text):
            return True
        before, text = text, GROUP.sub(lambda found: "x+" if VARIES.search(found[1]) else "x", text)
    return False
