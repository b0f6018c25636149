"""Writing text with the flags of generate and chat: how tokens are chosen, and where a text ends."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from minilora.adapters.serve import merged_if_faster
from minilora.cli.flags import add_fields
from minilora.llama import Llama
from minilora.models.generate import generate
from minilora.models.text import TextStream
from minilora.models.tokenizer import Tokenizer
from minilora.runs.config import option


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
