"""Chat with a model that has a chat template.

Replies are printed to standard output, everything else to standard error.

Example:
  minilora chat --adapter run --temperature 0.7
"""

import importlib
import sys
from contextlib import suppress
from dataclasses import replace

from minilora.cli import Options, Parser, say
from minilora.cli.flags import from_flags
from minilora.cli.load import THINKING, add_model_flags, load, thinking_of
from minilora.cli.streaming import Completion, GenerationConfig, add_generation_flags, generate_text, say_cut
from minilora.errors import ConfigError, MiniloraError
from minilora.models.config import trained_length
from minilora.runs.conversations import encode_question
from minilora.runs.formats import Conversation, Fields

CHAT_HELP = """\
/reset        start a new conversation
/system TEXT  set the system prompt; without TEXT, remove it
/help         show this
/exit         end the chat, as Ctrl-D does
Ctrl-C stops a reply. A message that begins with / needs a space before it."""


def add_flags(parser: Parser) -> None:
    parser.description = f"{parser.description}\n\n{CHAT_HELP}"
    add_model_flags(parser)
    group = parser.group("conversation")
    group.add_argument("--system", metavar="TEXT", help="system prompt (default: that of the training)")
    group.add_argument("--thinking", **THINKING)
    add_generation_flags(parser, max_new_tokens=512)


def run(options: Options) -> int:
    chat = Chat(options)
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if is_terminal:
        with suppress(ImportError):
            importlib.import_module("readline")  # gives `input` a history and editing keys
        adapter = "".join(options["adapter"]) or "none"
        say(f"{chat.model.name_or_path}, adapter: {adapter}. /help lists the commands, Ctrl-D ends the chat.")
    prompt = "\n> " if is_terminal else ""
    while True:
        try:
            line = input(prompt)
        except EOFError:
            print(end="\n" if prompt else "")
            return 0
        if line.split(maxsplit=1)[:1] == ["/exit"]:
            return 0
        try:
            if line.startswith("/"):
                chat.obey(line)
            elif line.strip():
                chat.reply(line.strip())
        except MiniloraError as error:  # the conversation goes on as it was
            say(f"minilora: {error}")


class Chat:
    """A conversation with a model and its adapter, if it has one."""

    def __init__(self, options: Options):
        self.model, self.tokenizer = load(options)
        if self.tokenizer.template is None:
            name = self.model.name_or_path
            raise ConfigError(f"{name}: the model has no chat template; `minilora generate` continues a text")
        self._generation = from_flags(GenerationConfig, options)
        self._thinking = thinking_of(options, self.tokenizer)
        self.system: str | None = options["system"]  # None: that of the adapter's training
        self.turns: list[Fields] = []  # messages of the user and the assistant
        self.replies = 0  # in all conversations; each is sampled with the next seed
        if self.tokenizer.prompts.form == "plain":
            say("the model was trained on plain prompts, not on conversations: `minilora generate` asks as in training")

    def reply(self, text: str) -> None:
        """Print the reply to a message. Ctrl-C ends the reply; if there is none yet, the message is dropped."""
        system = self.tokenizer.prompts.system if self.system is None else self.system
        turns = [*self.turns, {"role": "user", "content": text}]
        opening = [{"role": "system", "content": system}] if system else []
        ids = encode_question(Conversation([*opening, *turns], thinking=self._thinking), self.tokenizer)
        if len(ids) > (limit := trained_length(self.model.config)):
            say(f"the conversation has {len(ids)} tokens, more than the {limit} of the model's training: see /reset")
        pieces: list[str] = []

        def show(piece: str) -> None:
            pieces.append(piece)
            print(piece, end="", flush=True)

        generation = replace(self._generation, seed=self._generation.seed + self.replies)
        written: list[Completion] = []
        with suppress(KeyboardInterrupt):
            written = generate_text(self.model, self.tokenizer, [ids], generation, show)
        print(flush=True)
        for each in written:
            say_cut(each, generation.max_new_tokens)
        self.replies += 1
        if pieces:
            self.turns = [*turns, {"role": "assistant", "content": "".join(pieces)}]

    def obey(self, command: str) -> None:
        """Run a command that begins with a slash."""
        name, argument = (*command.split(maxsplit=1), "")[:2]
        match name:
            case "/reset":
                self.turns = []
                say("started a new conversation")
            case "/system":
                self.system = argument.strip()
                say(f"system prompt: {self.system or 'none'}")
            case "/help":
                say(CHAT_HELP)
            case _:
                raise ConfigError(f"unknown command {name}; /help lists the commands")
