"""Text to token ids and back, and the special tokens and chat template that belong to a model.

A message that contains `<|im_end|>` must not end there. `quote` puts a mark into such text before the chat template
sees it, so a control token without a mark in the rendered text was written by the template. A second tokenizer, whose
control tokens have names that no text may hold, encodes the result: the template's control tokens are renamed, the
marks are removed, and the control tokens of messages are plain text.

Control tokens are those that `tokenizer.json` calls special. A template that takes messages apart, or that writes `<`
and then a name, can still be made to write one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minilora.errors import ConfigError, DataError, FormatError, check_types
from minilora.files import JSON_BYTES, read_json, read_text
from minilora.models.hub import fetch
from minilora.models.prompts import PROMPT_FILES, PROMPTS_FILE, Prompts, read_prompt_files
from minilora.models.tokenizer_json import no_panic, untrimmed

TOKENIZER_BYTES = 2**27  # of a tokenizer.json; that of 262,144 tokens has 33 MB

if TYPE_CHECKING:
    import tokenizers

    from minilora.models.template import Message, Tools

CONFIGS = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
TOKENIZER_FILES = ("tokenizer.json", *PROMPT_FILES, *CONFIGS)


def load_tokenizer(name_or_path: str | Path) -> Tokenizer:
    """Load the tokenizer of a model directory, of "minilora/builtin", or of a repository of the hub.

    Raises:
        FormatError: no such directory or repository, no `tokenizer.json`, or a file that is not what its name says.
    """
    check_types(load_tokenizer, locals())
    return Tokenizer(fetch(name_or_path, "tokenizer"))


def find_tokenizer(name_or_path: str | Path) -> Tokenizer | None:
    """Load the tokenizer of a model, or return None if its directory has no `tokenizer.json`."""
    directory = Path(name_or_path)
    if directory.is_dir() and not (directory / "tokenizer.json").is_file():
        return None
    return load_tokenizer(name_or_path)


class Tokenizer:
    """A `tokenizer.json` with the special tokens and the chat template of the files beside it.

    Attributes:
        special_tokens: the text of `bos_token`, `eos_token`, …
        eos_id: the token that closes an answer, or None.
        stop_ids: all tokens that end a generation.
        template: the chat template, or None.
        prompts: the prompts that the model was trained on.
    """

    def __init__(self, directory: Path):
        texts = {
            name: read_text(directory / name, TOKENIZER_BYTES if name == "tokenizer.json" else JSON_BYTES)
            for name in ("tokenizer.json", *CONFIGS)
            if (directory / name).exists()
        }
        if "tokenizer.json" not in texts:
            raise FormatError(f"{directory}: there is no tokenizer.json")
        texts |= read_prompt_files(directory)
        names = [name for name in (*CONFIGS, "config.json") if (directory / name).exists()]
        configs = {name: read_json(directory / name) for name in names}
        self._build(directory / "tokenizer.json", texts, configs, None)

    def _build(
        self, path: Path, texts: dict[str, str], configs: dict[str, dict[str, Any]], now: datetime | None
    ) -> None:
        self._path, self._texts, self._configs, self._now = path, texts, configs, now
        source = untrimmed(self._texts["tokenizer.json"], str(self._path))
        with no_panic(str(self._path)):
            self._backend = _backend(source)
            self._control = ControlTokens(source, self._backend)
        config, older, generation, model = (self._configs.get(name, {}) for name in (*CONFIGS, "config.json"))
        self.special_tokens = _special_tokens(older) | _special_tokens(config)
        stops = [*_ids(generation.get("eos_token_id")), *_ids(model.get("eos_token_id"))]
        named = self.token_id(self.special_tokens.get("eos_token"))
        self.eos_id = named if named is not None else next(iter(stops), None)
        self.stop_ids = {*stops, *_ids(self.eos_id)}
        self.prompts = Prompts.parse(self._texts.get(PROMPTS_FILE, "{}"), PROMPTS_FILE)
        self.template = None
        if template := self._texts.get("chat_template.jinja", _default_template(config.get("chat_template"))):
            from minilora.models.template import ChatTemplate  # here, so that only models with a template import jinja2

            self.template = ChatTemplate(template, self.special_tokens, self._now)

    def _copy(self, texts: dict[str, str], now: datetime | None) -> Tokenizer:
        """Return a copy with these files in place of its own."""
        other = object.__new__(Tokenizer)
        other._build(self._path, self._texts | texts, self._configs, now)
        return other

    def __len__(self) -> int:
        return self._backend.get_vocab_size()

    def token_id(self, token: str | None) -> int | None:
        """Return the id of a token by its text, or None."""
        return None if token is None else self._backend.token_to_id(token)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return token ids; with `add_special_tokens`, also those that the tokenizer puts around every text."""
        return self.encode_spans(text, add_special_tokens)[0]

    def encode_chat(
        self, messages: Sequence[Message], add_generation_prompt: bool = False, tools: Tools = None
    ) -> list[int]:
        """Return the token ids of a conversation, in which the control tokens of messages are plain text."""
        text = self.render(self.quote(list(messages)), add_generation_prompt, self.quote(tools))
        return self.encode(text, add_special_tokens=False)

    def quote(self, value: Any) -> Any:
        """Return text or messages whose control tokens `encode` and `encode_spans` take as plain text."""
        with no_panic(str(self._path)):
            return self._control.quote(value)

    def with_template(self, source: str) -> Tokenizer:
        """Return the same tokenizer with another chat template, which it is saved with; an empty one is none."""
        return self.with_files({"chat_template.jinja": source})

    def with_files(self, texts: Mapping[str, str]) -> Tokenizer:
        """Return the same tokenizer with other `PROMPT_FILES`, which it is saved with."""
        return self._copy(dict(texts), self._now)

    def with_tokens(self, tokens: Sequence[str]) -> Tokenizer:
        """Return the same tokenizer with new tokens, whose ids follow the others. They act in any text.

        Raises:
            ConfigError: a token is empty, is there already or is named twice.
        """
        import tokenizers

        if not tokens:
            return self
        if bad := [t for t in tokens if self.token_id(t) is not None or tokens.count(t) > 1 or not t]:
            raise ConfigError(f"new tokens: {bad[:5]} are empty, named twice, or tokens already")
        added = [tokenizers.AddedToken(token, normalized=False, special=False) for token in tokens]
        with no_panic(str(self._path)):
            backend = tokenizers.Tokenizer.from_str(self._texts["tokenizer.json"])
            backend.add_tokens(added)
            return self._copy({"tokenizer.json": backend.to_str(pretty=True)}, self._now)

    def at(self, now: datetime) -> Tokenizer:
        """Return the same tokenizer, whose chat template takes `now` for the date."""
        return self._copy({}, now)

    def encode_spans(self, text: str, add_special_tokens: bool = True) -> tuple[list[int], list[tuple[int, int]]]:
        """Return token ids, and the characters [begin, end) of the text that each stands for.

        The span of a token that is not from the text is empty. Characters that the tokenizer drops, such as white
        space, belong to the token after them.
        """
        if found := re.search("[\ud800-\udfff]", text):
            raise DataError(f"the text holds U+{ord(found[0]):04X}, which is not a character")
        backend, origin = self._backend, list(range(len(text) + 1))
        with no_panic(str(self._path)):
            if QUOTE in text:
                backend, (text, origin) = self._control.backend, self._control.rename(text)
            encoding = backend.encode(text, add_special_tokens=add_special_tokens)
        spans, previous = [], 0
        for (begin, end), is_added in zip(encoding.offsets, encoding.special_tokens_mask, strict=True):
            if is_added and begin == end:
                begin = end = previous
            first = min(begin, previous)
            spans.append((origin[first], origin[end - 1] + 1 if end > first else origin[end]))
            previous = end
        return encoding.ids, spans

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        with no_panic(str(self._path)):
            return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False, tools: Tools = None) -> str:
        """Render a conversation as text; encode it with `add_special_tokens=False`."""
        if self.template is None:
            raise DataError("the model has no chat template, so conversations cannot be rendered")
        return self.template.render(messages, add_generation_prompt, tools)

    def save(self, directory: Path, names: Collection[str] = TOKENIZER_FILES) -> None:
        """Write the files that the tokenizer was read from, without what names code of a repository, `auto_map`."""
        directory.mkdir(parents=True, exist_ok=True)
        for name, text in self._texts.items():
            if name not in names:
                continue
            if name in CONFIGS and "auto_map" in (values := json.loads(text)):
                text = json.dumps({key: value for key, value in values.items() if key != "auto_map"}, indent=2)
            (directory / name).write_text(text, encoding="utf-8")


def _backend(source: str) -> tokenizers.Tokenizer:
    import tokenizers  # here, because it takes long

    return tokenizers.Tokenizer.from_str(source)


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """Return the entries `*_token`, which are text or an object that holds it."""
    texts = {key: value.get("content") if isinstance(value, dict) else value for key, value in config.items()}
    return {key: text for key, text in texts.items() if key.endswith("_token") and isinstance(text, str)}


def _ids(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [entry for entry in values if isinstance(entry, int) and 0 <= entry < 2**31]


def _default_template(value: Any) -> str | None:
    """Return the template of the old key `chat_template`: text, or a list of named templates."""
    if isinstance(value, list):
        named = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}
        value = named.get("default")
    return value if isinstance(value, str) else None


QUOTE, RENAMED = "\ufdd2", "\ufdd3"  # Unicode noncharacters, as those that template.py marks spans with
NONCHARACTERS = re.compile("[\ud800-\udfff\ufdd0-\ufdef]")  # also the halves of surrogate pairs


class ControlTokens:
    """The special tokens of a tokenizer that was made from `source`, a tokenizer.json."""

    def __init__(self, source: str, backend: tokenizers.Tokenizer):
        self._source = source
        added = [token for token in backend.get_added_tokens_decoder().values() if token.special]
        self._names = tuple(sorted((token.content for token in added), key=len, reverse=True))
        self._whole_words = {token.content for token in added if token.single_word}
        self._original = backend
        first = "".join(sorted({re.escape(name[0]) for name in self._names}))
        self._begins = re.compile(f"[{first}]" if first else "(?!)")  # (?!) never matches
        whole = "|".join(map(re.escape, self._names)) or "(?!)"  # the longest first
        self._whole_or_mark = re.compile(f"{QUOTE}|(?={self._begins.pattern})(?:{whole})(?!{QUOTE})")
        # Normalizing can make control tokens, of full-width letters for example.
        self._normalizer = backend.normalizer if any(token.normalized for token in added) else None

    def quote(self, value: Any) -> Any:
        """Return the same value with a mark in each control token of its strings and keys, however deep."""
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
            # At the end of a text also the beginning of one, which the text that follows could complete.
            is_short = end - at < len(self._names[0])
            is_begun = not is_key and is_short and any(name.startswith(text[at:end]) for name in self._names)
            return found[0] + QUOTE if is_whole or is_begun else found[0]

        quoted = self._begins.sub(marked, text)
        if quoted == text and self._normalizer:
            normalized = self._normalizer.normalize_str(text)
            return text[0] + QUOTE + text[1:] if any(name in normalized for name in self._names) else text
        return quoted

    def rename(self, text: str) -> tuple[str, list[int]]:
        """Return quoted text for `backend`, and the place in the quoted text of each of its characters and its end."""
        pieces: list[str] = []
        origin: list[int] = []
        position = 0
        for found in self._whole_or_mark.finditer(text):
            if found[0] in self._whole_words and not self._acts(text, *found.span()):
                continue
            pieces.append(text[position : found.start()])
            origin += range(position, found.start())
            position = found.end()
            if found[0] != QUOTE:
                pieces.append(RENAMED + found[0])
                origin += [found.start(), *range(*found.span())]
        return "".join([*pieces, text[position:]]), [*origin, *range(position, len(text) + 1)]

    def _acts(self, text: str, begin: int, end: int) -> bool:
        """Return whether a name in quoted text is a token, though it is one only as a whole word, between these two."""
        before, after = text[:begin][-2:].replace(QUOTE, "")[-1:], text[end : end + 1]
        found = self._original.encode(before + text[begin:end] + after, add_special_tokens=False)
        return self._original.token_to_id(text[begin:end]) in found.ids

    @cached_property
    def backend(self) -> tokenizers.Tokenizer:
        """The tokenizer with its control tokens renamed; the ids are the same."""
        data, names = json.loads(self._source), set(self._names)
        for entry in data["added_tokens"]:
            if entry["content"] in names:
                entry |= {"content": RENAMED + entry["content"], "normalized": False}
        _rename_model(data["model"], names)
        return _backend(json.dumps(data))


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
