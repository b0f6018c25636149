"""The command line: one module a command, with its help page, its flags and what it does.

A command's module has a docstring, which is its help page, `add_flags(parser)`, and `run(options)`, which returns the
exit status. It may have `prepare(parser, words)`, which sets other defaults once the command line is known. A module is
imported when its command is given.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import minilora
from minilora.definition import plain
from minilora.errors import MiniloraError

Options = dict[str, Any]  # the parsed flags of a command line
INTERRUPTED = 130  # the exit status of a program that Ctrl-C ended
COMMANDS = {
    "finetune": "train an adapter, or all weights; without --model and --data, on a built-in model and data",
    "generate": "answer or continue prompts",
    "chat": "talk with a model",
    "merge": "fold adapters into a model's weights and write the model",
    "extract": "write the adapter between two models",
    "export": "write an adapter in a plain form that more readers understand",
    "quantize": "write a model in four bits, as bitsandbytes reads it",
    "eval": "measure a model, with or without an adapter, on rows of data",
    "inspect": "show what a model, an adapter, a run or a safetensors file holds",
    "push": "upload an adapter or a model to the Hugging Face hub, with a card made from the run",
    "plot": "draw loss, evaluation, learning rate and gradient norm of runs",
}
BROKEN_PIPE = 141  # the exit status of a program whose output nobody reads any more


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    try:
        options = parse(sys.argv[1:] if arguments is None else arguments)
        run, is_plain = options.pop("run"), options.pop("plain", False)
        with plain() if is_plain else nullcontext():
            return run(options)
    except BrokenPipeError:  # the reader of the output has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except (MiniloraError, OSError) as error:
        print(f"minilora: {error}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search("can't allocate memory|out of memory", str(error)):
            raise
        print(f"minilora: does not fit into memory: {error}".splitlines()[0], file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        say(str(error) or "stopped")
        return INTERRUPTED


def parse(words: Sequence[str]) -> Options:
    """Return the options of a command line; "run" is the function that carries it out.

    Flags may have underscores for dashes. An unknown flag ends the program as in argparse; the nearest one is named.
    """
    words = [_dashed(word) for word in words] or ["--help"]
    if words[0] not in COMMANDS:
        _overview().parse_args(words)
        _overview().error("the command comes first")
    parser = command_parser(words[0])
    _check_words(parser, words[1:])
    prepare = getattr(_module(words[0]), "prepare", None)
    if prepare is not None:
        prepare(parser, words[1:])
    options, more = parser.parse_known_args(words[1:])
    if more:
        parser.error(f"{more[0]!r} is one word too many; several values of a flag are joined with commas")
    return vars(options)


def command_parser(name: str) -> argparse.ArgumentParser:
    """Return the parser of one command."""
    module = _module(name)
    about, _, example = str(module.__doc__).partition("Example:")
    parser = argparse.ArgumentParser(
        prog=f"minilora {name}",
        description=about,
        epilog=f"Example:{example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.add_flags(parser)
    if name not in ("inspect", "plot"):
        parser.add_argument("--plain", action="store_true", help="compute as the definitions say, without kernels")
    needed = [action for action in parser._actions if action.required]
    names = [" ".join([*action.option_strings, str(action.metavar or action.dest.upper())]) for action in needed]
    parser.usage = " ".join([parser.prog, *names, "[flags]"])  # argparse's own lists all flags
    parser.set_defaults(run=module.run)
    return parser


def _module(name: str) -> Any:
    importlib.import_module("minilora.public")  # registers the kernels
    return importlib.import_module(f"minilora.cli.{'evaluate' if name == 'eval' else name}")


def _overview() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="minilora",
        description="LoRA fine-tuning you can read.",
        epilog="Begin with `minilora finetune`; `minilora COMMAND --help` explains a command and has an example.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"minilora {minilora.__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, line in COMMANDS.items():
        subparsers.add_parser(name, help=line)
    return parser


def _check_words(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """End the program where a flag is unknown, naming the right one, or is given twice though only one would count."""
    from minilora.cli.flags import names_of, nearest  # which imports PyTorch, that the overview need not wait for

    actions = {spelling: action for action in parser._actions for spelling in action.option_strings}
    given: set[str] = set()
    for name in (word.partition("=")[0] for word in words if re.match(r"--\w[\w-]*(=|$)", word)):
        if name not in actions:
            parser.error(f"{name} is unknown{nearest(name, names_of(parser))}")
        if actions[name].dest in given and not isinstance(actions[name], argparse._AppendAction):
            parser.error(f"{name} is given twice; give all its values at once")
        given.add(actions[name].dest)


def _dashed(word: str) -> str:
    name, equals, value = word.partition("=")
    return (name.replace("_", "-") if name.startswith("--") else name) + equals + value


def say_bad(kind: str, bad: Sequence[str]) -> None:
    """Print how many rows of a kind were skipped, and the reasons for the first five."""
    say("\n  ".join((f"{len(bad)} {kind}rows cannot be used and were skipped:", *bad[:5])))


def say(text: str) -> None:
    """Print a message for the user to standard error, where no other program reads it."""
    print(text, file=sys.stderr, flush=True)
