"""The commands. Each parses its flags, calls the library, and prints what came of it."""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from collections.abc import Sequence

from minilora.cli import chat, evaluate, finetune, generate, inspect, merge, plot
from minilora.cli.command import Options, say
from minilora.cli.finetune import INTERRUPTED
from minilora.cli.flags import names_of, nearest, read_config, use_config
from minilora.errors import ConfigError, MiniloraError
from minilora.storage import ASSETS, BUILTIN, read_json

PAGE = 78  # characters of a line of a help page
BROKEN_PIPE = 141  # the exit status of a program that nobody listens to any more
COMMANDS = (
    finetune.COMMAND,
    generate.COMMAND,
    chat.COMMAND,
    merge.COMMAND,
    evaluate.COMMAND,
    inspect.COMMAND,
    plot.COMMAND,
)


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
    except KeyboardInterrupt as error:
        say(str(error) or "stopped")
        return INTERRUPTED


def parse(words: Sequence[str]) -> Options:
    """The options of a command line; "run" is the function that carries it out.

    Flags may have underscores for dashes. One that is unknown ends the program as argparse does, the nearest one named.
    """
    words = [_dashed(word) for word in words]
    parser, commands = _parser()
    if words[:1] == ["finetune"]:
        _apply_config(commands["finetune"], words[1:])
    options, unknown = parser.parse_known_args(words)
    if unknown:
        own = commands[options.command]
        own.error(f"{unknown[0]} is unknown{nearest(unknown[0].partition('=')[0], names_of(own))}")
    return {name: value for name, value in vars(options).items() if name != "command"}


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
        names = [str(action.metavar) for action in own._actions if not action.option_strings]
        own.usage = " ".join(["minilora", command.name, *names, "[flags]"])  # argparse's own lists all flags
        own.set_defaults(run=command.run)
        parsers[command.name] = own
    return parser, parsers


def _apply_config(finetune: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Values of --config become defaults; without --model and --data, those of the built-in example do.

    Raises:
        ConfigError: a model without data, or data without a model.
    """
    path = finetune.parse_known_args(words)[0].config
    values = read_config(path) if path is not None else {}
    values = values["config"] if isinstance(values.get("config"), dict) else values  # where run.json has them
    named = {word.partition("=")[0].removeprefix("--") for word in words if word.startswith("--")} | set(values)
    if len(named & {"model", "data"}) == 1:
        raise ConfigError(f"--model and --data go together; {BUILTIN!r} is the built-in model, or the built-in data")
    if not named & {"model", "data"}:
        use_config(finetune, read_json(ASSETS / "finetune.json"), "finetune.json")
    use_config(finetune, values, str(path))
