"""Generate text, and stream it without characters that a later token may still change."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import NamedTuple

from minilora.adapter import adapter_layers
from minilora.adapters.attach import count_parameters, merged
from minilora.cli import Parser, say
from minilora.cli.flags import add_fields
from minilora.llama import Llama
from minilora.models.generate import generate
from minilora.models.tokenizer import Tokenizer
from minilora.options import option

BATCH_SIZE = 8  # texts that are generated at a time
MERGE_BYTES = 2**30  # largest model that is merged: the merged weights exist in addition to the others
UNFINISHED = "\ufffd"  # what decoders return for bytes that are not, or not yet, a character


class TextStream:
    """Decode the tokens of one text as they come.

    The text is what all tokens decode to, without special ones; a character that tokens divide is added once it is
    whole, and `show` is called with it. For each token all tokens are decoded again: less than 1 ms for 4,000 of them.
    """

    def __init__(self, tokenizer: Tokenizer, show: Callable[[str], object] | None = None):
        self.text = ""  # what no later token changes
        self._tokenizer = tokenizer
        self._show = show
        self._bytes = {tokenizer.token_id(f"<0x{byte:02X}>") for byte in range(256)}
        self._tokens: list[int] = []

    def add(self, token: int) -> None:
        self._tokens.append(token)
        # Decoders join adjacent byte tokens, also over a special token, and an invalid one changes all of them.
        if token not in self._bytes and self._tokenizer.decode([token]):
            self._extend(self._tokenizer.decode(self._tokens).rstrip(UNFINISHED))

    def finish(self) -> str:
        """Return the whole text after the last token."""
        self._extend(self._tokenizer.decode(self._tokens))
        return self.text

    def _extend(self, decoded: str) -> None:
        if added := decoded[len(self.text) :]:
            self.text += added
            if self._show is not None:
                self._show(added)


class Completion(NamedTuple):
    text: str
    finish_reason: str  # "stop", or "length" if the text was cut


@dataclass(frozen=True)
class GenerationConfig:
    """Settings of text generation, which `minilora.generate` checks."""

    max_new_tokens: int
    temperature: float = option(0.0, "0: always the most likely token; above 0: sample; the higher, the more varied")
    top_p: float = option(1.0, "sample from the most likely tokens that together have this probability; 1: from all")
    top_k: int = option(0, "sample from this many of the most likely tokens; 0: from all")
    seed: int = option(0, "seed of the sampling")


def add_generation_flags(parser: Parser, max_new_tokens: int) -> None:
    """Add the flags of `GenerationConfig`, with the command's own default of --max-new-tokens."""
    group = parser.group("generation")
    limit = f"maximum number of tokens to generate (default: {max_new_tokens})"
    group.add_argument("--max-new-tokens", type=int, default=max_new_tokens, metavar="N", help=limit)
    add_fields(parser, GenerationConfig, "generation", but=("max_new_tokens",))


def generate_text(
    model: Llama,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    generation: GenerationConfig,
    show: Callable[[str], object] | None = None,
) -> list[Completion]:
    """Return what the model writes after each prompt. `show` is called with each settled piece of a text."""
    streams = [TextStream(tokenizer, show) for _ in prompts]
    with merged_if_small(model):
        written = generate(
            model,
            prompts,
            stop_ids=tokenizer.stop_ids,
            on_token=lambda row, token: streams[row].add(token),
            **asdict(generation),
        )
    reasons = ("length" if row.stop is None else "stop" for row in written)
    return [Completion(stream.finish(), reason) for stream, reason in zip(streams, reasons, strict=True)]


def say_cut(written: Completion, limit: int) -> None:
    """Say that a text was cut, if it was."""
    if written.finish_reason == "length":
        say(f"cut after {limit} tokens; --max-new-tokens allows more")


def merged_if_small(model: Llama) -> AbstractContextManager[None]:
    """Merge the active adapters inside the block, unless the model is large, to generate faster.

    An adapter that is applied costs a few small products per linear and token, a merge a few passes over the weights,
    once; docs/results.md has the times. In a larger model the weights outweigh that, and so does the memory of a second
    copy of them.
    """
    is_adapted = any(layer.active for layer in adapter_layers(model).values())
    size = count_parameters(model).total * next(model.parameters()).element_size()
    return merged(model) if is_adapted and size <= MERGE_BYTES else nullcontext()
