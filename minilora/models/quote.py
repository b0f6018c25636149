"""Text that cannot act: what looks like a control token in it is encoded as the characters it is written with.

Who writes `<|im_end|>` into a message must not be able to end it. So a mark is put into such text before the chat
template sees it ("quoted"); whatever control token is whole in the rendered text was written by the template. To
encode both rightly in one go, a second tokenizer is made in which control tokens have names that no text may hold:
the template's are renamed, the marks are removed, and what only looked like a control token is plain text.

Control tokens are those that `tokenizer.json` calls special. A template that takes a message apart and puts the rest
together, or that writes `<` and then a name, can still be made to write one: it composed it, so it is the template's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from minilora.errors import DataError

if TYPE_CHECKING:
    import tokenizers

QUOTE, RENAMED = "\ufdd2", "\ufdd3"  # Unicode noncharacters, as those that template.py marks spans with
NONCHARACTERS = re.compile("[\ud800-\udfff\ufdd0-\ufdef]")  # also the halves of surrogate pairs


class ControlTokens:
    """The special tokens of a tokenizer, which was made from `source`, a tokenizer.json."""

    def __init__(self, source: str, backend: tokenizers.Tokenizer):
        self._source = source
        added = [token for token in backend.get_added_tokens_decoder().values() if token.special]
        self._names = tuple(sorted((token.content for token in added), key=len, reverse=True))
        self._longest = max(map(len, self._names), default=0)
        first = "".join(sorted({re.escape(name[0]) for name in self._names}))
        self._begins = re.compile(f"[{first}]" if first else "(?!)")  # (?!) never matches
        # Normalizing may make a control token of what is none: of full-width letters, say.
        self._normalized = backend if any(token.normalized for token in added) and backend.normalizer else None

    def quote(self, value: Any) -> Any:
        """The same value, with a mark in all that looks like a control token in its strings and keys, however deep.

        Raises:
            DataError: a string holds one of the marks, which are not characters.
        """
        if isinstance(value, str):
            return self._quote(value)
        if isinstance(value, Mapping):
            return {self._quote(str(key), is_key=True): self.quote(entry) for key, entry in value.items()}
        return [self.quote(entry) for entry in value] if isinstance(value, list | tuple) else value

    def _quote(self, text: str, is_key: bool = False) -> str:
        if found := NONCHARACTERS.search(text):
            raise DataError(f"the text holds U+{ord(found[0]):04X}, which is not a character")
        end = len(text.rstrip())  # templates strip

        def marked(found: re.Match[str]) -> str:
            at = found.start()
            is_whole = text.startswith(self._names, at)
            # At a text's end also the beginning of one, which the text that follows could complete.
            is_begun = not is_key and end - at < self._longest and self._is_begun(text[at:end])
            return found[0] + QUOTE if is_whole or is_begun else found[0]

        quoted = self._begins.sub(marked, text)
        return quoted if quoted != text or not self._acts(text) else text[0] + QUOTE + text[1:]

    def _is_begun(self, tail: str) -> bool:
        return any(name.startswith(tail) for name in self._names)

    def _acts(self, text: str) -> bool:
        if self._normalized is None:
            return False
        normalized = self._normalized.normalizer.normalize_str(text)
        return any(name in normalized for name in self._names)

    def rename(self, text: str) -> tuple[str, list[int]]:
        """Quoted text for `backend`; and for each of its characters, and its end, where it stood in the quoted text."""
        pieces: list[str] = []
        origin: list[int] = []
        position = 0
        for found in self._whole_or_mark.finditer(text):
            pieces.append(text[position : found.start()])
            origin += range(position, found.start())
            position = found.end()
            if found[0] != QUOTE:
                pieces.append(RENAMED + found[0])
                origin += [found.start(), *range(*found.span())]
        return "".join([*pieces, text[position:]]), [*origin, *range(position, len(text) + 1)]

    @cached_property
    def _whole_or_mark(self) -> re.Pattern[str]:
        whole = "|".join(map(re.escape, self._names)) or "(?!)"  # the longest first
        return re.compile(f"{QUOTE}|(?={self._begins.pattern})(?:{whole})(?!{QUOTE})")

    @cached_property
    def backend(self) -> tokenizers.Tokenizer:
        """The tokenizer with its control tokens renamed; the ids are the same."""
        import tokenizers

        data, names = json.loads(self._source), set(self._names)
        for entry in data["added_tokens"]:
            if entry["content"] in names:
                entry |= {"content": RENAMED + entry["content"], "normalized": False}
        _rename_model(data["model"], names)
        backend = tokenizers.Tokenizer.from_str(json.dumps(data))
        backend.no_truncation()
        backend.no_padding()
        return backend


def _rename_model(model: dict[str, Any], names: set[str]) -> None:
    """Rename what stands for control tokens in the vocabulary, so that no text leads there."""
    vocabulary = model.get("vocab")
    if isinstance(vocabulary, dict):
        model["vocab"] = {RENAMED + name if name in names else name: i for name, i in vocabulary.items()}
    elif isinstance(vocabulary, list):
        model["vocab"] = [[RENAMED + name if name in names else name, score] for name, score in vocabulary]
    if model.get("unk_token") in names:
        model["unk_token"] = RENAMED + model["unk_token"]
    if model.get("merges"):
        pairs = [merge if isinstance(merge, list) else merge.split(" ") for merge in model["merges"]]
        model["merges"] = [pair for pair in pairs if names.isdisjoint([*pair, "".join(pair)])]
