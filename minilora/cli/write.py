"""Generate text, and stream it without characters that a later token may still change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import final

from torch import nn

from minilora.adapter import adapter_layers
from minilora.adapters.attach import merged
from minilora.cli import Parser
from minilora.cli.flags import add_fields
from minilora.errors import ConfigError, option
from minilora.llama import Llama
from minilora.models.generate import generate
from minilora.models.tokenizer import Tokenizer
from minilora.nf4 import NF4Linear

MERGE_TOKENS = 40  # below, a merge may take longer than it saves
MERGE_BYTES = 2**30  # the most that the merged weights may take beside the others
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
class GenerationConfig:
    """Settings of text generation, which `minilora.generate` checks."""

    max_new_tokens: int
    stop: tuple[str, ...]
    temperature: float = option(0.0, "0: the most likely token; above 0: sample, with the logits divided by this")
    top_p: float = option(1.0, "sample from the most likely tokens that together have this probability")
    top_k: int = option(0, "sample from this many of the most likely tokens; 0: from all")
    seed: int = option(0, "seed of the sampling")


def add_generation_flags(parser: Parser, max_new_tokens: int) -> None:
    """Add the flags of `GenerationConfig`, with the command's own default of --max-new-tokens."""
    group = parser.group("generation")
    limit = f"maximum number of tokens to generate (default: {max_new_tokens})"
    group.add_argument("--max-new-tokens", type=int, default=max_new_tokens, metavar="N", help=limit)
    stop = "end the text before this string; repeat the flag for several"
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help=stop)
    add_fields(parser, GenerationConfig, "generation", but=("max_new_tokens", "stop"))


def generate_text(
    model: Llama,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    generation: GenerationConfig,
    show: Callable[[str], object] | None = None,
) -> list[str]:
    """Return the text that the model generates after each prompt. `show` is called with each settled piece."""
    settings = asdict(generation)
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

    with merged(model) if is_faster_merged(model, generation.max_new_tokens) else nullcontext():
        generate(model, prompts, stop_ids=tokenizer.stop_ids, on_token=on_token, **settings)
    for row, stream in enumerate(streams):
        append(row, stream.finish())
    return texts


def is_faster_merged(model: Llama, tokens: int) -> bool:
    """Return whether so many tokens are generated faster if the active adapters are merged first.

    An adapter that is applied costs a few small products per linear and token, a merge a few passes over the weights,
    once. With r 16 on all linears of SmolLM2, on a CPU, milliseconds:

                               bfloat16    NF4    float32
        a token, applied             31     82         52
        a token, merged              23     24         44
        the merge                   310    470        157

    In a larger model the weights outweigh that, and so does the memory of a second copy of them.
    Against float32 logits were off by 0.14 to 0.19 in bfloat16 merged, by 0.13 to 0.17 applied.
    """
    active = [layer.base for layer in adapter_layers(model).values() if layer.active]
    size = sum(_dense_bytes(base) for base in active)
    return tokens >= MERGE_TOKENS and 0 < size <= MERGE_BYTES


def _dense_bytes(base: nn.Module) -> int:
    """Return the size of a module's weights in the dtype of the computation."""
    if isinstance(base, NF4Linear):
        return base.out_features * base.in_features * base.dtype.itemsize
    return sum(parameter.nbytes for parameter in base.parameters())
