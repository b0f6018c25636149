"""Talk with a model, message by message, by its chat template.

Replies are printed to standard output, everything else to standard error.

Example:
  minilora chat --adapter run --temperature 0.7
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from minilora.adapter import set_adapter
from minilora.cli import INTERRUPTED, Options, say
from minilora.cli.flags import from_flags
from minilora.cli.load import Loaded, adapters, add_model_flags, load
from minilora.cli.write import Writing, add_writing_flags, write
from minilora.errors import ConfigError, FormatError, MiniloraError
from minilora.models.template import Message

NONE = "none"
CHAT_HELP = """\
/reset              begin a new conversation
/system TEXT        set the system prompt; without TEXT, have none
/adapter NAME|none  go on with this adapter, or with none; alone: list them
/help               show this
/exit               end, as Ctrl-D does
Ctrl-C stops a reply. A message that begins with / needs a space before it."""


class Chat:
    """A conversation, and the adapter that takes part in it.

    Attributes:
        turns: what user and assistant said.
        adapter: the name of the active adapter, or "none".
        replies: how many were written, also in conversations before; each is sampled with a seed of its own.
    """

    def __init__(self, loaded: Loaded, options: Options):
        self._model, self._tokenizer = loaded.model, loaded.tokenizer
        self._writing = from_flags(Writing, options)
        paths = adapters(options)
        names = [Path(path).resolve().name for path in paths]
        is_clear = len({NONE, *names}) == len(names) + 1
        self._loaded = dict(zip(names if is_clear else paths, loaded.adapters, strict=True))
        self._system = loaded.training.config.get("system") if options["system"] is None else options["system"]
        self.turns: list[Message] = []
        self.adapter, self.replies = NONE, 0
        if self._loaded:
            self._use(next(iter(self._loaded)))

    def reply(self, text: str) -> None:
        """Write the answer to a message. Ctrl-C ends it where it is; without any answer the message is forgotten."""
        turns = [*self.turns, {"role": "user", "content": text}]
        system = [{"role": "system", "content": self._system}] if self._system else []
        ids = self._tokenizer.encode_chat([*system, *turns], add_generation_prompt=True)
        if len(ids) > (limit := self._model.config.max_position_embeddings):
            say(f"the conversation has {len(ids)} tokens, and the model was made for {limit}: see /reset")
        pieces: list[str] = []

        def show(piece: str) -> None:
            pieces.append(piece)
            print(piece, end="", flush=True)

        writing = replace(self._writing, seed=self._writing.seed + self.replies)
        with suppress(KeyboardInterrupt):
            write(self._model, self._tokenizer, [ids], writing, show)
        print(flush=True)
        self.replies += 1
        if pieces:
            self.turns = [*turns, {"role": "assistant", "content": "".join(pieces)}]
        else:
            say("there was no answer, and the message is forgotten")

    def obey(self, command: str) -> None:
        """Carry out one of the commands that begin with a slash."""
        name, argument = (*command.split(maxsplit=1), "")[:2]
        argument = argument.strip()
        match name:
            case "/reset":
                self.turns = []
                say("a new conversation begins")
            case "/system":
                self._system = argument
                say(f"system prompt: {self._system or NONE}")
            case "/adapter":
                if argument:
                    self._use(argument)
                say("\n".join(f"{'*' if known == self.adapter else ' '} {known}" for known in (NONE, *self._loaded)))
            case "/help":
                say(CHAT_HELP)
            case _:
                raise ConfigError(f"there is no command {name}; /help lists them")

    def _use(self, name: str) -> None:
        if name not in (NONE, *self._loaded):
            raise ConfigError(f"no adapter is called {name!r}; there are {[NONE, *self._loaded]}")
        if self._loaded:
            set_adapter(self._model, [] if name == NONE else self._loaded[name])
        self.adapter = name


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.description = f"{parser.description}\n\n{CHAT_HELP}"
    add_model_flags(parser, many_adapters=True)
    group = parser.add_argument_group("conversation")
    group.add_argument("--system", metavar="TEXT", help="system prompt")
    add_writing_flags(parser, max_new_tokens=512)


def run(options: Options) -> int:
    loaded = load(options)
    base = loaded.model.name_or_path
    if loaded.tokenizer.template is None:
        raise ConfigError(
            f"{base}: the model has no chat template, so it knows no turns; "
            "`minilora generate --raw` continues text with it"
        )
    chat = Chat(loaded, options)
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if is_terminal:
        with suppress(ImportError):
            importlib.import_module("readline")  # gives `input` a history and editing keys
        say(f"{base}, adapter: {chat.adapter}. /help lists the commands, Ctrl-D ends.")
    try:
        _converse(chat, _lines("\n> " if is_terminal else ""))
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def _converse(chat: Chat, lines: Iterator[str]) -> None:
    for line in lines:
        if line.split(maxsplit=1)[:1] == ["/exit"]:
            return
        try:
            if line.startswith("/"):
                chat.obey(line)
            elif line.strip():
                chat.reply(line.strip())
        except MiniloraError as error:  # the conversation goes on as it was
            say(f"minilora: {error}")


def _lines(prompt: str) -> Iterator[str]:
    """What the user enters, until Ctrl-D. On a terminal, where there is a prompt, Ctrl-C drops a line."""
    while True:
        try:
            line = input(prompt)
            line.encode()
        except EOFError:
            return print(end="\n" if prompt else "")
        except KeyboardInterrupt:
            if not prompt:
                raise
        except UnicodeError as error:
            raise FormatError("standard input is not UTF-8") from error
        else:
            yield line
