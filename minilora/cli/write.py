"""Text as generate and chat write it: how tokens are chosen, where a text ends, and of the tokens that came so far
the characters that no later token can change.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import final

from minilora.adapters.serve import merged_if_faster
from minilora.cli.flags import add_fields
from minilora.errors import ConfigError, option
from minilora.llama import Llama
from minilora.models.generate import generate
from minilora.models.tokenizer import Tokenizer

UNFINISHED = "\ufffd"  # what decoders write for bytes that are no character, or none yet
LONGEST, KEPT = 64, 8  # tokens that are decoded anew for each one that comes, and how many of them give the context


@final
class TextStream:
    """Tokens of one text in, text that is safe to show out.

    What `add` and `finish` gave, put together, is the text of all tokens, special ones left out, up to where the first
    of the stop strings begins: whatever the tokens are, and wherever they cut the text.

    Attributes:
        is_stopped: a stop string came, and there is no more text.

    Raises:
        ConfigError: a stop string is empty.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()):
        if not all(stops):
            raise ConfigError("a stop string is empty")
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._bytes = {tokenizer.token_id(f"<0x{byte:02X}>") for byte in range(256)}
        self._tokens: list[int] = []  # the last ones
        self._text = ""  # that of `_tokens` which was handed on
        self._held = ""  # may be the beginning of a stop string
        self.is_stopped = False

    def add(self, token: int) -> str:
        """The text that is settled by one more token."""
        self._tokens.append(token)
        # Byte tokens are decoded together, also with a special token between them, and one wrong one spoils them all.
        if token in self._bytes or not self._tokenizer.decode([token]):
            return ""
        text = self._tokenizer.decode(self._tokens)
        settled = text.rstrip(UNFINISHED)
        new, self._text = settled[len(self._text) :], settled
        if text == settled and len(self._tokens) > LONGEST:
            self._forget()
        return self._until_stop(new)

    def finish(self) -> str:
        """The rest of the text, as no more tokens come."""
        return self._until_stop(self._tokenizer.decode(self._tokens)[len(self._text) :], is_last=True)

    def _forget(self) -> None:
        """Keep just enough tokens to decode those that follow as if all were there: the first ones may lose a space."""
        tokens = self._tokens[-KEPT:]
        if (text := self._tokenizer.decode(tokens)).rstrip(UNFINISHED):
            self._tokens, self._text = tokens, text

    def _until_stop(self, new: str, is_last: bool = False) -> str:
        """Up to the first place where a stop string begins, or could begin if more text comes."""
        if self.is_stopped:
            return ""
        text, self._held = self._held + new, ""
        for begin in range(len(text)):
            if text.startswith(self._stops, begin):
                self.is_stopped = True
                return text[:begin]
            if not is_last and any(stop.startswith(text[begin:]) for stop in self._stops):
                self._held = text[begin:]
                return text[:begin]
        return text


@dataclass(frozen=True)
class Writing:
    """Where a text ends, and how its tokens are chosen; `generate` checks the numbers."""

    max_new_tokens: int
    stop: tuple[str, ...]
    temperature: float = option(0.0, "0: the likeliest token each time")
    top_p: float = option(1.0, "sample from so much probability")
    top_k: int = option(0, "sample from so many tokens; 0: from all")
    repetition_penalty: float = option(1.0, "above 1: what prompt and text hold already becomes less likely")
    seed: int = option(0, "of the sampling")


def add_writing_flags(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    """The flags of `Writing`; the commands differ in how much they write."""
    group = parser.add_argument_group("writing")
    group.add_argument(
        "--max-new-tokens",
        type=int,
        default=max_new_tokens,
        metavar="N",
        help=f"tokens to write at most (default: {max_new_tokens})",
    )
    group.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; give it again for more"
    )
    add_fields(parser, Writing, "writing", but=("max_new_tokens", "stop"))


def write(
    model: Llama,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    writing: Writing,
    show: Callable[[str], None] | None = None,
) -> list[str]:
    """The text that the model writes after each prompt. `show` gets every piece of it as soon as it is settled."""
    settings = asdict(writing)
    stops = settings.pop("stop")
    streams = [TextStream(tokenizer, stops) for _ in prompts]
    pieces: list[list[str]] = [[] for _ in prompts]

    def give(row: int, piece: str) -> None:
        pieces[row].append(piece)
        if show is not None and piece:
            show(piece)

    def on_token(row: int, token: int) -> bool:
        give(row, streams[row].add(token))
        return streams[row].is_stopped

    with merged_if_faster(model, writing.max_new_tokens):
        generate(model, prompts, stop_ids=tokenizer.stop_ids, on_token=on_token, **settings)
    for row, stream in enumerate(streams):
        give(row, stream.finish())
    return ["".join(row) for row in pieces]
