"""Groups of flags that several commands have: the model, what it is asked, and how it writes."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from minilora.cli.flags import add_flags
from minilora.errors import ConfigError
from minilora.models.quantization import QuantizeConfig
from minilora.runs.config import option


def add_model_flags(parser: argparse.ArgumentParser, many_adapters: bool = False) -> None:
    """--model, --adapter, --dtype, --device, and how the model is quantized."""
    group = parser.add_argument_group("model and device")
    group.add_argument(
        "--model",
        help="directory of the base model, or org/name[@revision] of the Hugging Face hub "
        "(default: the one the adapter was made for, else the built-in one)",
    )
    action, more = ("append", "; give it again for more") if many_adapters else ("store", "")
    group.add_argument("--adapter", action=action, help=f"directory of an adapter, or a hub id{more}")
    group.add_argument(
        "--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="number format (default: auto)"
    )
    group.add_argument("--device", default="auto", help="cpu, cuda, mps; auto: the best there is (default: auto)")
    add_flags(parser, QuantizeConfig, group.title or "", unset="as the adapter was trained")


def add_prompt_flags(parser: argparse.ArgumentParser) -> None:
    """--prompt, --prompts, --system and --raw."""
    group = parser.add_argument_group("prompts")
    one_of = group.add_mutually_exclusive_group()
    one_of.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="what to answer or, if the model has no chat template, to continue; give it again for more; "
        "-: all of standard input, which is also read where no prompt is given and it is no terminal",
    )
    one_of.add_argument(
        "--prompts",
        metavar="FILE",
        help=".txt: a prompt a line; else rows as in training, of which an answer is left out; a `prompt` of text "
        "needs no `completion`, and without one it is asked as --prompt is",
    )
    group.add_argument("--system", metavar="TEXT", help="system prompt of conversations that have none")
    group.add_argument(
        "--raw",
        action=argparse.BooleanOptionalAction,
        help="continue the prompt as it is, without the chat template, control tokens acting "
        "(default: as the adapter's rows were written; else by the template, if there is one)",
    )


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
    add_flags(parser, Writing, "writing", but=("max_new_tokens", "stop"))


@dataclass(frozen=True)
class Output:
    """Which texts are written, and how they are printed."""

    samples: int = option(1, "texts for each prompt")
    compare_base: bool = option(False, "show what the base model writes, left, beside the adapter's")
    json: bool = option(
        False,
        "print a JSON object a line, as --prompts and several --prompt always do: the prompt's row and `text`; "
        "`sample`, from 1, with --samples, and `base` with --compare-base",
    )
    batch_size: int = option(8, "texts written at a time; in float32 it does not change them")

    def __post_init__(self) -> None:
        counts = {"samples": self.samples, "batch_size": self.batch_size}
        if bad := [f"{name} is {value}" for name, value in counts.items() if value < 1]:
            raise ConfigError(f"{', '.join(bad)}, need at least 1")
