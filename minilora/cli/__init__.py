"""The command line: one module for each command.

The module of a command has a docstring, which is its help text, `add_flags(parser)`, and `run(options)`, which returns
the exit status. It is imported when its command is given.
"""

import argparse
import difflib
import importlib
import importlib.metadata
import os
import re
import signal
import sys
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any, NoReturn

import minilora
from minilora.definition import plain
from minilora.errors import ConfigError, DataError, FormatError, MiniloraError, TargetError, in_recipe, printable

Options = dict[str, Any]  # the parsed flags of a command line; those of data classes are None if they are not given
SIGNALLED = 128  # the exit status of a program that signal n ended is 128 + n
INTERRUPTED = 130  # that of Ctrl-C
BROKEN_PIPE = 141  # that of a program whose output nobody reads any more
COMMANDS = {
    "finetune": "train an adapter; without --model and --data, on a built-in model and data",
    "generate": "generate text from prompts",
    "chat": "chat with a model",
    "merge": "merge adapters into a model's weights and save the model",
    "export": "write an adapter for another program: vLLM, llama.cpp, mlx-lm, PEFT",
    "quantize": "quantize a model to 4 bits, in the format of bitsandbytes",
    "eval": "evaluate a model, with or without an adapter",
    "inspect": "show what is in a model, an adapter, a run or a safetensors file, and whether it was changed",
    "push": "upload an adapter or a model to the Hugging Face Hub, with a card made from the run",
    "selftest": "check the laws of LoRA on this machine, kernels included",
    "plot": "plot the losses of runs",
}
_THEIRS = {  # what to use here, and the flags of TRL, axolotl, mlx-lm and litgpt that it answers
    "use --model": "model-name-or-path base-model checkpoint-dir",
    "use --data": "dataset-name datasets json-path",
    "use --out": "output-dir out-dir save-path",
    "use --out to train, --adapter afterwards": "adapter-path lora-path lora-model-dir",
    "use --epochs": "num-train-epochs num-epochs",
    "use --max-steps": "iters",
    "use --batch-size": "per-device-train-batch-size micro-batch-size",
    "use --batch-size and --gradient-accumulation-steps": "global-batch-size grad-accumulation-steps",
    "use --learning-rate": "lr",
    "use --lr-scheduler": "lr-scheduler-type",
    "use --warmup-steps, where 0.03 is 3 % of the steps": "warmup-ratio lr-warmup-steps",
    "use --max-length": "max-seq-length max-seq-len sequence-len cutoff-len",
    "use --lora-r": "rank lora-rank",
    "use --target-modules; all linear layers are the default": "lora-target-modules lora-target-linear lora-target "
    "lora-query lora-key lora-value",
    "use --layers-to-transform with numbers of layers, and --target-modules with names": "num-layers lora-layers",
    "use --use-dora for DoRA; LoRA needs no flag": "fine-tune-type",
    "use --quantize nf4": "load-in-4bit bnb-4bit-quant-type",
    "8 bits are not supported; --quantize nf4 uses 4": "load-in-8bit",
    "use --prompt-style": "template chat-template chat-template-path",
    "use --dtype bfloat16": "bf16 fp16 precision",
    "use --gradient-checkpointing block": "grad-checkpoint",
    "use --eval-split": "val-set-size val-split-fraction",
    "use --eval-steps": "steps-per-eval eval-strategy interval evals-per-epoch",
    "use --eval-data": "test",
    "use --keep best with --eval-steps": "early-stopping-patience load-best-model-at-end",
    "use --save-steps": "save-every save-interval saves-per-epoch",
    "use --logging-steps": "steps-per-report log-interval",
    "use --report": "report-to wandb-project",
    "use --columns text=NAME": "dataset-text-field",
    "use --train-on completion, assistant or all": "completion-only-loss assistant-only-loss mask-prompt "
    "train-on-inputs",
    "use --max-new-tokens": "max-tokens",
    "leave it out: the same command resumes a run": "resume-from-checkpoint",
    "leave it out: torchrun -m minilora finetune starts several processes": "deepspeed",
    "use --adapter": "resume-adapter-file",
    "leave it out: `minilora push` uploads a finished run": "push-to-hub hub-model-id",
    "leave it out: finetune trains an adapter": "train use-peft",
    "leave it out: rows are laid end to end without padding, as packing does": "packing sample-packing group-by-length",
    "leave it out: attention needs no other package": "flash-attention flash-attn attn-implementation",
    "leave it out: all held-out rows are evaluated": "val-batches",
    "leave it out: finetune trains a LoRA adapter": "stage finetuning-type",
    "leave it out: it is AdamW; ml.train(optimizer=…) takes others": "optim optimizer",
    in_recipe("ties_and_dare"): "combination-type",
    in_recipe("classify_texts"): "task-type",
    in_recipe("dpo"): "dpo dpo-beta",
    in_recipe("grpo"): "grpo",
    in_recipe("loraplus"): "loraplus-lr-ratio",
    in_recipe("experts"): "target-parameters",
}
ERROR_PAGES: dict[type, str] = {  # of other errors: debugging.md
    DataError: "guide.md#1-the-data",
    ConfigError: "settings.md",
    TargetError: "methods.md#which-modules-which-rank",
}
COMMAND_PAGES = {  # of a wrong setting or name, by the command
    **dict.fromkeys(("export", "push", "inspect"), "deploy.md#as-an-adapter"),
    **dict.fromkeys(("generate", "chat", "eval"), "guide.md#6-ask-measure-compare"),
    "merge": "deploy.md#as-a-model",
    "plot": "guide.md#4-when-the-loss-does-not-fall",
    "quantize": "qlora.md#a-4-bit-checkpoint",
}
FOREIGN_FLAGS = {f"--{name}": advice for advice, names in _THEIRS.items() for name in names.split()}
SETTING = r"""(?x) (?: \w+Config:\ )? (?<! [\w./'"-] ) (?P<name>  # in a message, outside quotes and paths
    [a-z]+_\w+
    | (?: (?<= Config:\ ) | (?<= [;,]\ ) | (?<= \( ) ) [a-z]+ (?= \ (?:is|was)\ )
    | [a-z]+ (?= \ \w+= )
    ) (?! \.\w | [\w/'"(=?-] )"""
OVERVIEW = """\
usage: minilora COMMAND [flags]

LoRA fine-tuning you can read. The commands:
{commands}

Start with `minilora finetune`: it trains a built-in model for about a minute,
and writes minilora-run. `minilora COMMAND --help` shows the flags of a command
and an example, `minilora --version` the version.
Pages by question: {pages}"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    # An exception ends the program, so that no temporary file is left.
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(SIGNALLED + number))
    options: Options = {}
    try:
        options = parse(sys.argv[1:] if arguments is None else arguments)
        with plain() if options.get("plain") else nullcontext():
            return int(_module(options["command"]).run(options))
    except BrokenPipeError:  # the reader of the output has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except (MiniloraError, OSError, UnicodeError) as error:  # the last: of standard input, or of a name
        message = str(error) if isinstance(error, FormatError) else _in_flags(str(error), options)
        message = message.replace("see docs/", f"see {address_of('')}")
        name = ERROR_PAGES.get(type(error), "debugging.md")
        if isinstance(error, ConfigError | TargetError):
            name = COMMAND_PAGES.get(options.get("command", ""), name)
        page = f"see {address_of(name)}"
        say(f"minilora: {message}" + ("" if "see " in message else f"\n{page}" if "\n" in message else f"; {page}"))
        return 1
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search("can't allocate memory|out of memory", str(error)):
            raise
        trains = options.get("command") == "finetune"
        smaller = "a smaller --batch-size, --gradient-checkpointing block" if trains else "a smaller model"
        advice = f"; {smaller} or --quantize nf4 takes less; see {address_of('debugging.md#out-of-memory')}"
        say(f"minilora: out of memory: {error}".splitlines()[0] + advice)
        return 1
    except KeyboardInterrupt as error:
        say(str(error) or "stopped")
        return INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, before)


def parse(words: Sequence[str]) -> Options:
    """Return the options of a command line, with the name of the command as "command".

    Flags may be spelled with underscores instead of dashes. An unknown command or flag ends the program, and so does a
    flag that asks for help.
    """
    command, *words = [_dashed(word) for word in words] or ["--help"]
    if command in ("-h", "--help", "--version"):
        commands = "\n".join(f"  {name:<9} {about}" for name, about in COMMANDS.items())
        version = f"minilora {minilora.__version__}"
        print(version if command == "--version" else OVERVIEW.format(commands=commands, pages=address_of("README.md")))
        raise SystemExit(0)
    if command not in COMMANDS:
        advice = closest_name(command, COMMANDS) or f"the commands are {', '.join(COMMANDS)}"
        say(f"minilora: {command} is not a command; {advice}")
        raise SystemExit(2)
    if command == "finetune" and not {"-h", "--help"}.isdisjoint(words):
        command_parser(command, is_short=True).print_help()
        raise SystemExit(0)
    parser = command_parser(command)
    options, unknown = parser.parse_known_args(words)
    if unknown:
        name = unknown[0]
        if name.startswith("--"):
            bad = {}
            for name in (word.partition("=")[0] for word in unknown if word.startswith("--")):
                flags = (f"--{flag.replace('_', '-')}" for flag in vars(options))
                theirs = f"--{name[2:].rpartition('.')[2]}"  # litgpt has --train.epochs
                advice = FOREIGN_FLAGS.get(theirs) or closest_name(name, flags) or f"see `{parser.prog} --help`"
                bad[name] = f"{name} is unknown; {advice}"
            parser.error("\n".join(bad.values()))
        flag = "data" if os.path.isfile(name) else "adapter" if os.path.isdir(name) else ""
        if flag in options:
            parser.error(f"unexpected argument {name!r}; did you mean --{flag} {name}?")
        forms = "a list is joined with commas, text with spaces is quoted, and a switch (--x or --no-x) has no value"
        parser.error(f"unexpected argument {name!r}; {forms}")
    return {**vars(options), "command": command}


def _in_flags(message: str, options: Options) -> str:
    """Return a message of the library with the names of settings as the flags of the command."""
    from minilora.runs.settings import FLAG_NAMES, flag

    def as_flag(found: re.Match[str]) -> str:
        return flag(found["name"]) if FLAG_NAMES.get(found["name"], found["name"]) in options else found[0]

    return re.sub(SETTING, as_flag, message)


def address_of(page: str) -> str:
    """Return where a page of docs/, such as guide.md#1-the-data, is: online if the release has an address."""
    try:
        urls = importlib.metadata.metadata("minilora").get_all("Project-URL") or []
    except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
        urls = []
    home = next((url.partition(", ")[2] + "/blob/main/" for url in urls if url.startswith("Homepage, ")), "")
    return f"{home}docs/{page}"


def closest_name(name: str, known: Iterable[str]) -> str:
    """Ask for the known name that is most like an unknown one; empty if none is alike."""
    matches = difflib.get_close_matches(name, [*known], n=1, cutoff=0.7)
    return f"did you mean {matches[0]}?" if matches else ""


class Parser(argparse.ArgumentParser):
    """The parser of a command, whose module has the docstring `doc`. Its errors leave out the usage: all flags."""

    def __init__(self, name: str, doc: str):
        about, _, example = doc.partition("Example:")
        super().__init__(
            prog=f"minilora {name}",
            description=about,
            epilog=f"Example:{example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self._groups: dict[str, Any] = {}

    def group(self, title: str) -> Any:
        """Return the group of the help page that has this title."""
        if title not in self._groups:
            self._groups[title] = self.add_argument_group(title)
        return self._groups[title]

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def command_parser(name: str, is_short: bool = False) -> Parser:
    """Return the parser of one command; that of a short page of help has only the main flags of `finetune`."""
    module = _module(name)
    parser = Parser(name, str(module.__doc__))
    if is_short:
        module.add_flags(parser, module.MAIN_FLAGS)
        parser.epilog = f"{parser.epilog}\nThese are the main flags; `{parser.prog} --help-all` shows all."
        return parser
    module.add_flags(parser)
    if name in ("finetune", "generate", "chat", "merge", "eval"):
        parser.add_argument("--plain", action="store_true", help="run the six files as written, without faster kernels")
    return parser


def _module(name: str) -> Any:
    importlib.import_module("minilora.public")  # registers the kernels
    return importlib.import_module(f"minilora.cli.{'evaluate' if name == 'eval' else name}")


def _dashed(word: str) -> str:
    name, equals, value = word.partition("=")
    return (name.replace("_", "-") if name.startswith("--") else name) + equals + value


def say(text: str) -> None:
    """Print a message for the user to standard error, without control characters of the names that it quotes."""
    print(printable(text), file=sys.stderr, flush=True)
