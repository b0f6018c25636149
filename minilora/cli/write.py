"""Writing text with the flags of generate and chat: how tokens are chosen, and where a text ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict

from minilora.adapters.serve import merged_if_faster
from minilora.cli.groups import Writing
from minilora.models.generate import generate
from minilora.models.llama import Llama
from minilora.models.text import TextStream
from minilora.models.tokenizer import Tokenizer


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
