"""Writing text with the flags of generate and chat: how tokens are chosen, and where a text ends."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from minilora.cli.command import Options, add_dashed
from minilora.model.generate import generate
from minilora.model.llama import Llama
from minilora.model.text import TextStream
from minilora.model.tokenizer import Tokenizer

SETTINGS = ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty")


def add_writing_flags(parser: argparse.ArgumentParser, max_new_tokens: int) -> None:
    """How tokens are chosen, and --stop."""
    group = parser.add_argument_group("writing")
    add_dashed(
        group,
        "max_new_tokens",
        type=int,
        default=max_new_tokens,
        metavar="N",
        help=f"tokens to write at most (default: {max_new_tokens})",
    )
    group.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0: the likeliest token each time (default: 0)"
    )
    add_dashed(
        group, "top_p", type=float, default=1.0, metavar="P", help="sample from so much probability (default: 1)"
    )
    add_dashed(
        group, "top_k", type=int, default=0, metavar="K", help="sample from so many tokens; 0: from all (default: 0)"
    )
    add_dashed(
        group,
        "repetition_penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="above 1: what prompt and text hold already becomes less likely (default: 1)",
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling (default: 0)")
    group.add_argument(
        "--stop",
        action="append",
        metavar="TEXT",
        help="end before this text; give it again for more",
    )


def write(
    model: Llama,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    options: Options,
    seed: int,
    show: Callable[[str], None] | None = None,
) -> list[str]:
    """The text that the model writes after each prompt. `show` gets every piece of it as soon as it is settled."""
    streams = [TextStream(tokenizer, options["stop"] or ()) for _ in prompts]
    pieces: list[list[str]] = [[] for _ in prompts]

    def give(row: int, piece: str) -> None:
        pieces[row].append(piece)
        if show is not None and piece:
            show(piece)

    def on_token(row: int, token: int) -> bool:
        give(row, streams[row].add(token))
        return streams[row].is_stopped

    settings = {name: options[name] for name in SETTINGS}
    generate(model, prompts, seed=seed, stop_ids=tokenizer.stop_ids, on_token=on_token, **settings)
    for row, stream in enumerate(streams):
        give(row, stream.finish())
    return ["".join(row) for row in pieces]
