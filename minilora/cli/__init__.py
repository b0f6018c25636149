"""The command line: one module for each command.

The module of a command has a docstring, which is its help text, `add_flags(parser)`, and `run(options)`, which returns
the exit status. It may have `prepare(parser, words)`, which changes defaults according to the command line. It is
imported when its command is given.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import re
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from types import FrameType
from typing import Any

import minilora
from minilora.definition import plain
from minilora.errors import MiniloraError, check_utf8, in_recipe, printable

Options = dict[str, Any]  # the parsed flags of a command line
SIGNALLED = 128  # the exit status of a program that signal n ended is 128 + n
INTERRUPTED = 130  # that of Ctrl-C
BROKEN_PIPE = 141  # that of a program whose output nobody reads any more
COMMANDS = {
    "finetune": "train an adapter or all weights; without --model and --data, on a built-in model and data",
    "generate": "generate text from prompts",
    "chat": "chat with a model",
    "merge": "merge adapters into a model's weights and save the model",
    "export": "save an adapter in a plain form that more tools can read",
    "quantize": "quantize a model to 4 bits, in the format of bitsandbytes",
    "eval": "evaluate a model, with or without an adapter",
    "inspect": "show what a model, an adapter, a run or a safetensors file holds, and whether it is as it was written",
    "push": "upload an adapter or a model to the Hugging Face Hub, with a card made from the run",
    "selftest": "check the laws of LoRA on this machine, kernels included",
    "plot": "plot loss and evaluations of runs",
}
GONE = {"extract": in_recipe("extract"), "verify": "use 'inspect', which also compares files with their hashes"}
MAIN_FLAGS = {  # what --help shows of commands with many flags; --help-all shows all of them
    "finetune": "model data eval_data out resume quantize lora_r lora_alpha target_modules learning_rate batch_size "
    "epochs max_steps dry_run"
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _end) if is_main else None
    try:
        options = parse(sys.argv[1:] if arguments is None else arguments)
        run, is_plain = options.pop("run"), options.pop("plain", False)
        with plain() if is_plain else nullcontext():
            return run(options)
    except BrokenPipeError:  # the reader of the output has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except (MiniloraError, OSError, UnicodeError) as error:  # the last: of standard input
        is_full = re.search("No space left|[Qq]uota exceeded|File too large", str(error))
        advice = "; make room on the disk, and repeat the command" if is_full else ""
        say(f"minilora: {error}{advice}")
        return 1
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search("can't allocate memory|out of memory", str(error)):
            raise
        advice = "; smaller batches, shorter rows or --quantize nf4 take less"
        say(f"minilora: out of memory: {error}".splitlines()[0] + advice)
        return 1
    except KeyboardInterrupt as error:
        say(str(error) or "stopped")
        return INTERRUPTED
    finally:
        if is_main:
            signal.signal(signal.SIGTERM, before)


def _end(number: int, frame: FrameType | None) -> None:
    """End the program at a signal by an exception, so that no temporary file is left."""
    raise SystemExit(SIGNALLED + number)


def parse(words: Sequence[str]) -> Options:
    """Return the options of a command line, with the function that runs the command as "run".

    Flags may be spelled with underscores instead of dashes. An unknown command or flag ends the program, as in
    argparse.
    """
    check_utf8("an argument", *words)
    words = [_dashed(word) for word in words] or ["--help"]
    if words[0] not in COMMANDS:
        overview = _overview()
        if not words[0].startswith("-"):
            near = difflib.get_close_matches(words[0], COMMANDS, n=1)
            advice = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(COMMANDS)}"
            overview.error(f"{words[0]!r} is no command; {GONE.get(words[0], advice)}")
        overview.parse_args(words)  # ends the program
    parser = command_parser(words[0])
    if words[0] in MAIN_FLAGS and {"-h", "--help"} & {*words}:
        _show_only(parser, MAIN_FLAGS[words[0]].split())
    _check_words(parser, words[1:])
    prepare = getattr(_module(words[0]), "prepare", None)
    if prepare is not None:
        prepare(parser, words[1:])
    options, more = parser.parse_known_args(words[1:])
    if more:
        before = [word.partition("=")[0] for word in words[1 : words.index(more[0])] if word.startswith("--")]
        parser.error(f"unexpected argument {more[0]!r}; {_values_of(parser, before[-1] if before else None)}")
    return vars(options)


def _values_of(parser: argparse.ArgumentParser, name: str | None) -> str:
    """Return how values are given to the flag that stands before an unexpected one."""
    if name is None:
        return "a value follows its flag"
    action = parser._option_string_actions[name]
    if action.nargs == 0:
        return f"{name} takes no value; it is {' or '.join(action.option_strings)}"
    if isinstance(action, argparse._AppendAction):
        return f"repeat {name} before each value, and quote a value that has spaces"
    return f"{name} takes one value; quote one that has spaces, and join the parts of a list with commas"


def command_parser(name: str) -> argparse.ArgumentParser:
    """Return the parser of one command, with all its flags."""
    module = _module(name)
    about, _, example = str(module.__doc__).partition("Example:")
    parser = argparse.ArgumentParser(
        prog=f"minilora {name}",
        description=about,
        epilog=f"Example:{example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    if name in MAIN_FLAGS:
        parser.add_argument("--help-all", action="help", dest="help", help="show all flags and exit")
    module.add_flags(parser)
    if name not in ("inspect", "plot"):
        parser.add_argument("--plain", action="store_true", help="use the plain definitions instead of the kernels")
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
        epilog="Start with `minilora finetune`. `minilora COMMAND --help` shows the flags of a command and an example.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"minilora {minilora.__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, line in COMMANDS.items():
        subparsers.add_parser(name, help=line)
    return parser


def _show_only(parser: argparse.ArgumentParser, names: Sequence[str]) -> None:
    """Leave the other flags out of the help page, and say so at its end."""
    for action in parser._actions:
        if action.dest not in ("help", *names):
            action.help = argparse.SUPPRESS
    parser.epilog = f"{parser.epilog}\n\nThese are the main flags; `{parser.prog} --help-all` shows all."


def _check_words(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """End the program if a flag is unknown, with the nearest one as advice, or if a flag is given twice."""
    from minilora.cli.flags import names_of, nearest  # here: it imports PyTorch, which the overview does not need

    actions = {spelling: action for action in parser._actions for spelling in action.option_strings}
    given: set[str] = set()
    for name in (word.partition("=")[0] for word in words if re.match(r"--\w[\w-]*(=|$)", word)):
        if name not in actions:
            parser.error(f"{name} is unknown{nearest(name, names_of(parser))}")
        if actions[name].dest in given and not isinstance(actions[name], argparse._AppendAction):
            parser.error(f"{name} is given twice; give all its values at once")  # argparse would ignore the first
        given.add(actions[name].dest)


def _dashed(word: str) -> str:
    name, equals, value = word.partition("=")
    return (name.replace("_", "-") if name.startswith("--") else name) + equals + value


def describe_skipped(kind: str, bad: Sequence[str]) -> str:
    """Return a message with the number of rows of a kind that were skipped, and the reasons for the first five."""
    return "\n  ".join((f"{len(bad)} {kind}rows cannot be used and were skipped:", *bad[:5]))


def say(text: str) -> None:
    """Print a message for the user to standard error, without control characters of the names that it quotes."""
    print(printable(text), file=sys.stderr, flush=True)
