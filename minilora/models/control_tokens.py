"""Text that cannot act as a control token.

A message that contains `<|im_end|>` must not end there. `quote` puts a mark into such text before the chat template
sees it, so a control token without a mark in the rendered text was written by the template. A second tokenizer, whose
control tokens have names that no text may hold, encodes the result: `rename` gives the template's control tokens these
names and removes the marks, and the control tokens of messages are plain text.

Control tokens are those that `tokenizer.json` calls special. Those that a template writes act also within a word, even
if the file wants them as whole words only (`single_word`), which no tokenizer for conversations does. A template that
takes messages apart, or that writes `<` and then a name, can still be made to write one.
"""

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import tokenizers

from minilora.errors import DataError

QUOTE, RENAMED = "\ufdd2", "\ufdd3"  # Unicode noncharacters, as those that template.py marks spans with
NONCHARACTERS = re.compile("[\ud800-\udfff\ufdd0-\ufdef]")  # also the halves of surrogate pairs


def build(source: bytes) -> tokenizers.Tokenizer:
    """Build the tokenizer of a tokenizer.json, without truncation and padding; its offsets keep white space."""
    backend = tokenizers.Tokenizer.from_buffer(re.sub(rb'"trim_offsets"\s*:\s*true', b'"trim_offsets":false', source))
    backend.no_truncation()
    backend.no_padding()
    return backend


class ControlTokens:
    """The tokenizer of `source`, a tokenizer.json, and its special tokens."""

    def __init__(self, source: bytes):
        self.source, self.original = source, build(source)
        added = [token for token in self.original.get_added_tokens_decoder().values() if token.special]
        self._names = tuple(sorted((token.content for token in added), key=len, reverse=True))
        first = "".join(sorted({re.escape(name[0]) for name in self._names}))
        self._begins = re.compile(f"[{first}]" if first else "(?!)")  # (?!) never matches
        whole = "|".join(map(re.escape, self._names)) or "(?!)"  # the longest first
        self._whole_or_mark = re.compile(f"{QUOTE}|(?={self._begins.pattern})(?:{whole})(?!{QUOTE})")
        # Normalizing can make control tokens, of full-width letters for example.
        self._normalizer = self.original.normalizer if any(token.normalized for token in added) else None

    def quote(self, value: Any) -> Any:
        """Return the same value with a mark in each control token of its strings and keys, however deep."""
        if isinstance(value, str):
            return self._quote(value)
        if isinstance(value, Mapping):
            return {self._quote(str(key)): self.quote(entry) for key, entry in value.items()}
        return [self.quote(entry) for entry in value] if isinstance(value, list | tuple) else value

    def _quote(self, text: str) -> str:
        if match := NONCHARACTERS.search(text):
            raise DataError(f"the text has U+{ord(match[0]):04X}, which is not a character")
        end = len(text.rstrip())  # templates strip

        def marked(first: re.Match[str]) -> str:
            at = first.start()
            is_whole = text.startswith(self._names, at)
            # Also a beginning of one at the end of a text, which the text that follows could complete.
            is_short = end - at < len(self._names[0])
            is_begun = is_short and any(name.startswith(text[at:end]) for name in self._names)
            return first[0] + QUOTE if is_whole or is_begun else first[0]

        quoted = self._begins.sub(marked, text)
        if quoted == text and self._normalizer:
            normalized = self._normalizer.normalize_str(text)
            return text[0] + QUOTE + text[1:] if any(name in normalized for name in self._names) else text
        return quoted

    def encode(self, text: str, add_special_tokens: bool) -> tuple[tokenizers.Encoding, Sequence[int]]:
        """Encode text that is quoted in places; return also where in it each encoded character is, and its end."""
        if QUOTE not in text:
            return self.original.encode(text, add_special_tokens=add_special_tokens), range(len(text) + 1)
        renamed, origin = self.rename(text)
        return self.backend.encode(renamed, add_special_tokens=add_special_tokens), origin

    def rename(self, text: str) -> tuple[str, list[int]]:
        """Return quoted text for `backend`, and the place in the quoted text of each of its characters and its end."""
        pieces: list[str] = []
        origin: list[int] = []
        position = 0
        for match in self._whole_or_mark.finditer(text):
            pieces.append(text[position : match.start()])
            origin += range(position, match.start())
            position = match.end()
            if match[0] != QUOTE:
                pieces.append(RENAMED + match[0])
                origin += [match.start(), *range(*match.span())]
        return "".join([*pieces, text[position:]]), [*origin, *range(position, len(text) + 1)]

    @cached_property
    def backend(self) -> tokenizers.Tokenizer:
        """The tokenizer with its control tokens renamed; the ids are the same."""
        data, names = json.loads(self.source), set(self._names)
        for entry in data["added_tokens"]:
            if entry["content"] in names:
                entry |= {"content": RENAMED + entry["content"], "normalized": False, "single_word": False}
        _rename_model(data["model"], names)
        return build(json.dumps(data).encode())


def _rename_model(model: dict[str, Any], names: set[str]) -> None:
    """Rename control tokens in the vocabulary, so that no text leads to them."""
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
