"""Text to token ids and back, and the special tokens and chat template that belong to a model."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minilora.errors import ConfigError, DataError, FormatError
from minilora.files import open_file, parse_object, read_text
from minilora.models.hub import locate
from minilora.models.prompts import PROMPT_FILES, PROMPTS_FILE, Prompts, read_prompt_files

TOKENIZER_BYTES = 2**27  # of a tokenizer.json; that of 262,144 tokens has 33 MB
TOKENIZER_VALUES = 10**7  # in a tokenizer.json; that of 262,144 tokens has 2.4 million

if TYPE_CHECKING:
    from minilora.models.control_tokens import ControlTokens
    from minilora.models.template import Message, Tools

CONFIGS = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
TOKENIZER_FILES = ("tokenizer.json", *PROMPT_FILES, *CONFIGS)


def load_tokenizer(name_or_path: str | Path) -> Tokenizer:
    """Load the tokenizer of a model directory, of "minilora/builtin", or of a repository of the hub.

    Raises:
        FormatError: no such directory or repository, no `tokenizer.json`, or a file that is not what its name says.
    """
    from minilora.models.control_tokens import ControlTokens  # here, because its package takes long

    directory = locate(name_or_path, "tokenizer").path
    path = directory / "tokenizer.json"
    if not path.exists():
        raise FormatError(f"{directory}: there is no tokenizer.json")
    configs = [directory / name for name in (*CONFIGS, "config.json")]
    texts = {config.name: read_text(config) for config in configs if config.exists()}
    with open_file(path, TOKENIZER_BYTES) as file:
        source = file.read()  # text with a character beyond 16 bits would take four bytes for each
    if sum(map(source.count, (b",", b"[", b"{"))) > TOKENIZER_VALUES:
        raise FormatError(f"{path}: more than {TOKENIZER_VALUES:,} values")
    with _no_panic(str(path)):
        control = ControlTokens(source)
    return Tokenizer(path, control, texts | read_prompt_files(directory))


def find_tokenizer(name_or_path: str | Path) -> Tokenizer | None:
    """Load the tokenizer of a model, or return None if its directory has no `tokenizer.json`."""
    directory = Path(name_or_path)
    if directory.is_dir() and not (directory / "tokenizer.json").is_file():
        return None
    return load_tokenizer(name_or_path)


class Tokenizer:
    """A `tokenizer.json` with the special tokens and the chat template of the files in its directory.

    Args:
        path: of `tokenizer.json`, for messages.
        control: the tokenizer of this file, which tokenizers with other texts share.
        texts: the contents of the other files, by name.
        now: what the chat template takes for the date; by default, the time of rendering.
        origin: where the chat template is from, for messages; by default, the directory of `tokenizer.json`.

    Attributes:
        special_tokens: the text of `bos_token`, `eos_token`, …
        eos_id: the token that closes an answer, or None.
        stop_ids: all tokens that end a generation.
        template: the chat template, or None.
        prompts: the prompts that the model was trained on.
    """

    def __init__(
        self,
        path: Path,
        control: ControlTokens,
        texts: Mapping[str, str],
        now: datetime | None = None,
        origin: str = "",
    ):
        self._path, self._texts, self._now = path, dict(texts), now
        self._control, self._backend = control, control.original
        self._ids: dict[int, int] = {}  # one object for each id: a third of the memory of a data set
        config, older, generation, model = (
            parse_object(texts.get(name, "{}"), str(self._path.with_name(name))) for name in (*CONFIGS, "config.json")
        )
        self.special_tokens = _special_tokens(older) | _special_tokens(config)
        stops = [*_ids(generation.get("eos_token_id")), *_ids(model.get("eos_token_id"))]
        named = self.token_id(self.special_tokens.get("eos_token"))
        self.eos_id = named if named is not None else next(iter(stops), None)
        self._stops = {*stops, *_ids(self.eos_id)}
        self.prompts = Prompts.parse(texts.get(PROMPTS_FILE, "{}"), PROMPTS_FILE)
        self.template = None
        if template := texts.get("chat_template.jinja", _default_template(config.get("chat_template"))):
            # Here, so that only models with a template import jinja2.
            from minilora.models.template import DEFAULTS, ChatTemplate

            if PROMPTS_FILE in texts and template.startswith(DEFAULTS):
                template = template.partition("\n")[2]
            name = "chat_template.jinja" if "chat_template.jinja" in texts else "tokenizer_config.json"
            try:
                self.template = ChatTemplate(template, self.special_tokens, now)
            except FormatError as error:
                raise FormatError(f"{origin or path.with_name(name)}: {error}") from error

    @cached_property
    def stop_ids(self) -> set[int]:
        """Those that the files name, and the one that the template ends an answer with, if no file names it."""
        ids = self.encode(self.template.turn_end, add_special_tokens=False)[:1] if self.template else []
        return self._stops.union(self._backend.get_added_tokens_decoder().keys() & ids)

    def with_files(self, texts: Mapping[str, str], now: datetime | None = None, origin: str = "") -> Tokenizer:
        """Return the same tokenizer with other files, which it is saved with; its chat template takes `now` as date."""
        if "tokenizer.json" in texts:
            raise ConfigError("with_files keeps tokenizer.json; write another one to a directory for load_tokenizer")
        return Tokenizer(self._path, self._control, {**self._texts, **texts}, now or self._now, origin)

    def with_prompts(self, prompts: Prompts) -> Tokenizer:
        """Return the same tokenizer with other prompts; it saves a template that gives them to other programs."""
        texts = {PROMPTS_FILE: json.dumps(vars(prompts), indent=2, ensure_ascii=False) + "\n"}
        if template := self.template:
            texts["chat_template.jinja"] = template.with_defaults(prompts.system, prompts.thinking)
        return self.with_files(texts)

    def __len__(self) -> int:
        return self._backend.get_vocab_size()

    def token_id(self, token: str | None) -> int | None:
        """Return the id of a token by its text, or None."""
        return None if token is None else self._backend.token_to_id(token)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return token ids; with `add_special_tokens`, also those that the tokenizer puts around every text."""
        return self.encode_spans(text, add_special_tokens)[0]

    def encode_chat(
        self, messages: Sequence[Message], add_generation_prompt: bool = False, tools: Tools = None, **variables: Any
    ) -> list[int]:
        """Return the token ids of a conversation, in which the control tokens of messages are plain text."""
        text = self.render(self.quote(list(messages)), add_generation_prompt, self.quote(tools), **variables)
        return self.encode(text, add_special_tokens=False)

    def quote(self, value: Any) -> Any:
        """Return text or messages whose control tokens `encode` and `encode_spans` take as plain text."""
        with _no_panic(str(self._path)):
            return self._control.quote(value)

    def encode_spans(self, text: str, add_special_tokens: bool = True) -> tuple[list[int], list[tuple[int, int]]]:
        """Return token ids, and the characters [begin, end) of the text that each stands for.

        The span of a token that is not from the text is empty. Characters that the tokenizer drops, such as white
        space, belong to the token after them.
        """
        if half := re.search("[\ud800-\udfff]", text):
            raise DataError(f"the text has U+{ord(half[0]):04X}, half of a surrogate pair, which is not a character")
        with _no_panic(str(self._path)):
            encoding, origin = self._control.encode(text, add_special_tokens)
        spans, previous = [], 0
        for (begin, end), is_added in zip(encoding.offsets, encoding.special_tokens_mask, strict=True):
            if is_added and begin == end:
                begin = end = previous
            first = min(begin, previous)
            spans.append((origin[first], origin[end - 1] + 1 if end > first else origin[end]))
            previous = end
        return [self._ids.setdefault(token, token) for token in encoding.ids], spans

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        with _no_panic(str(self._path)):
            return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def render(
        self, messages: Sequence[Message], add_generation_prompt: bool = False, tools: Tools = None, **variables: Any
    ) -> str:
        """Render a conversation as text; encode it with `add_special_tokens=False`.

        `variables` of the template are `enable_thinking`, whether to ask for an answer with thoughts, and others.
        """
        if self.template is None:
            raise DataError("the model has no chat template, so conversations cannot be rendered; give a prompt_style")
        return self.template.render(messages, add_generation_prompt, tools=tools, **variables)

    def save(self, directory: Path, names: Collection[str] = TOKENIZER_FILES) -> None:
        """Write the files that the tokenizer was read from, without `auto_map`, which names code of a repository.

        A template that is a file is removed from `tokenizer_config.json`, where llama.cpp looks first.
        """
        left_out = {"auto_map", "chat_template"} if "chat_template.jinja" in self._texts else {"auto_map"}
        directory.mkdir(parents=True, exist_ok=True)
        if "tokenizer.json" in names:
            (directory / "tokenizer.json").write_bytes(self._control.source)
        for name in self._texts.keys() & names:
            text = self._texts[name]
            if name in CONFIGS and left_out & (values := json.loads(text)).keys():
                text = json.dumps({key: value for key, value in values.items() if key not in left_out}, indent=2)
            (directory / name).write_text(text, encoding="utf-8")


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """Return the entries `*_token`, which are text or an object with a text."""
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


@contextmanager
def _no_panic(where: str) -> Iterator[None]:
    """Raise a `FormatError` for what the package raises: these two errors themselves, or a panic, which is none."""
    try:
        yield
    except BaseException as error:
        if type(error) not in (Exception, ValueError) and type(error).__name__ != "PanicException":
            raise
        raise FormatError(f"{where}: {error}") from error
