"""Generate text and stream it, without characters that a later token may still change."""

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

UNFINISHED = "\ufffd"  # what decoders return for bytes that are not, or not yet, a character


@final
class TextStream:
    """Decode the tokens of one text as they come, up to the first stop string.

    The strings that `add` and `finish` return, joined, are the decoded text of all tokens, without special ones, up to
    where the first stop string begins, wherever tokens divide the text or a character. For each token all tokens are
    decoded again, which costs less than 1 ms for 4,000 of them.

    Attributes:
        is_stopped: whether a stop string was found, which ends the text.

    Raises:
        ConfigError: a stop string is empty.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()):
        if not all(stops):
            raise ConfigError("a stop string is empty")
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._bytes = {tokenizer.token_id(f"<0x{byte:02X}>") for byte in range(256)}
        self._tokens: list[int] = []
        self._returned = 0  # the number of characters that were returned
        self.is_stopped = False

    def add(self, token: int) -> str:
        """Return the text that one more token settles."""
        self._tokens.append(token)
        # Decoders join adjacent byte tokens, also over a special token, and an invalid one changes all of them.
        if token in self._bytes or not self._tokenizer.decode([token]):
            return ""
        return self._new(self._tokenizer.decode(self._tokens).rstrip(UNFINISHED))

    def finish(self) -> str:
        """Return the rest of the text after the last token."""
        return self._new(self._tokenizer.decode(self._tokens), is_last=True)

    def _new(self, text: str, is_last: bool = False) -> str:
        """Return what is new, up to where a stop string begins, or may begin when more text follows."""
        if self.is_stopped:
            return ""
        begin = self._returned
        while begin < len(text) and not self.is_stopped:
            if text.startswith(self._stops, begin):
                self.is_stopped = True
            elif not is_last and any(stop.startswith(text[begin:]) for stop in self._stops):
                break
            else:
                begin += 1
        new, self._returned = text[self._returned : begin], begin
        return new


@dataclass(frozen=True)
class Writing:
    """Settings of text generation, which `minilora.generate` checks."""

    max_new_tokens: int
    stop: tuple[str, ...]
    temperature: float = option(0.0, "0: the most likely token; above 0: sample, with the logits divided by this")
    top_p: float = option(1.0, "sample from the most likely tokens that together have this probability")
    top_k: int = option(0, "sample from this many of the most likely tokens; 0: from all")
    repetition_penalty: float = option(1.0, "above 1: tokens of the prompt and of the text so far become less likely")
    seed: int = option(0, "seed of the sampling")


def add_writing_flags(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    """Add the flags of `Writing`, with the command's own default of --max-new-tokens."""
    group = parser.add_argument_group("generation")
    limit = f"maximum number of tokens to generate (default: {max_new_tokens})"
    group.add_argument("--max-new-tokens", type=int, default=max_new_tokens, metavar="N", help=limit)
    stop = "end the text before this string; repeat the flag for several"
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help=stop)
    add_fields(parser, Writing, "generation", but=("max_new_tokens", "stop"))


def write(
    model: Llama,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    writing: Writing,
    show: Callable[[str], object] | None = None,
) -> list[str]:
    """Return the text that the model generates after each prompt. `show` is called with each settled piece."""
    settings = asdict(writing)
    stops = settings.pop("stop")
    streams = [TextStream(tokenizer, stops) for _ in prompts]
    texts = [""] * len(prompts)

    def append(row: int, piece: str) -> None:
        texts[row] += piece
        if show is not None and piece:
            show(piece)

    def on_token(row: int, token: int) -> bool:
        append(row, streams[row].add(token))
        return streams[row].is_stopped

    with merged_if_faster(model, writing.max_new_tokens):
        generate(model, prompts, stop_ids=tokenizer.stop_ids, on_token=on_token, **settings)
    for row, stream in enumerate(streams):
        append(row, stream.finish())
    return texts
