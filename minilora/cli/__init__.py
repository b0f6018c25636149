"""The commands. Each parses its flags, calls the library, and prints what came of it."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import sys
import textwrap
from collections.abc import Sequence

from minilora.cli.command import INTERRUPTED, Options, say
from minilora.cli.commands import COMMANDS
from minilora.cli.flags import names_of, nearest
from minilora.errors import MiniloraError

PAGE = 78  # characters of a line of a help page
BROKEN_PIPE = 141  # the exit status of a program that nobody listens to any more


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    try:
        options = parse(sys.argv[1:] if arguments is None else arguments)
        return options.pop("run")(options)
    except BrokenPipeError:  # who reads what is printed has seen enough
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
    """The options of a command line; "run" is the function that carries it out.

    Flags may have underscores for dashes. One that is unknown ends the program as argparse does, the nearest one named.
    """
    words = [_dashed(word) for word in words] or ["--help"]
    parser, commands = _parser()
    own = commands.get(words[0])
    if own:
        _check_words(own, words[1:])
        prepare = next(command.prepare for command in COMMANDS if command.name == words[0])
        if prepare:
            prepare(own, words[1:])
    options, more = parser.parse_known_args(words)
    if own and more:
        own.error(f"{more[0]!r} is one word too many; several values of a flag are joined with commas")
    return {name: value for name, value in vars(options).items() if name != "command"}


def _check_words(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """End the program where a flag is unknown, naming the right one, or is given twice though only one would count."""
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


def _parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser of everything, and those of the commands by name."""
    parser = argparse.ArgumentParser(
        prog="minilora",
        description="LoRA fine-tuning you can read.",
        epilog="Begin with `minilora finetune`; `minilora COMMAND --help` explains a command and has an example.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"minilora {importlib.metadata.version('minilora')}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    parsers = {}
    for command in COMMANDS:
        own = subparsers.add_parser(
            command.name,
            help=command.help,
            description="\n".join(textwrap.fill(line, PAGE) for line in command.about.split("\n")),
            epilog=f"example:\n  {command.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.add_flags(own)
        needed = [action for action in own._actions if action.required]
        names = [" ".join([*action.option_strings, str(action.metavar or action.dest.upper())]) for action in needed]
        own.usage = " ".join(["minilora", command.name, *names, "[flags]"])  # argparse's own lists all flags
        own.set_defaults(run=command.run)
        parsers[command.name] = own
    return parser, parsers
