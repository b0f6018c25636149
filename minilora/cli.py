"""The commands. Each parses its flags, calls the library, and prints what came of it."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from minilora.errors import ConfigError, MiniloraError
from minilora.flags import add_flags, from_flags, read_config, use_config
from minilora.lora.attach import disable_adapter, merge, set_adapter
from minilora.lora.config import LoraConfig
from minilora.lora.files import CONFIG_FILE, load_adapter
from minilora.model.checkpoint import load_model, save_model
from minilora.model.generate import generate
from minilora.model.llama import Llama
from minilora.model.tokenizer import Tokenizer, load_tokenizer
from minilora.run import Outcome, Run, RunConfig, Scores, evaluate, evaluate_base, holds_files, pick_device
from minilora.storage import ASSETS, BUILTIN, model_directory, read_json
from minilora.train.config import TrainConfig
from minilora.train.data import encode_rows, find_splits, read_rows
from minilora.train.evaluate import choice_accuracy, exact_match, find_choices, held_out_loss
from minilora.train.loop import Record

INTERRUPTED = 130  # the exit status of a program that Ctrl-C ended


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    try:
        options = parse(sys.argv[1:] if arguments is None else arguments)
        return options.pop("run")(options)
    except (MiniloraError, OSError) as error:
        print(f"minilora: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        _say("stopped; a run goes on from its newest checkpoint when the same command is given again")
        return INTERRUPTED


def parse(words: Sequence[str]) -> dict[str, Any]:
    """The options of a command line; "run" is the function that carries it out."""
    parser, commands = _parser()
    if list(words[:1]) == ["finetune"]:
        _apply_config(commands["finetune"], words[1:])
    return vars(parser.parse_args(words))


def _parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    parser = argparse.ArgumentParser(prog="minilora", description="LoRA fine-tuning you can read.", allow_abbrev=False)
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    commands = {}
    for name, run, help in (
        ("finetune", _finetune, "train an adapter; without --model and --data, on a built-in model and data"),
        ("generate", _generate, "continue a prompt"),
        ("merge", _merge, "fold adapters into a model's weights and write the model"),
        ("eval", _eval, "measure a model, with or without an adapter, on rows of data"),
    ):
        commands[name] = subparsers.add_parser(name, help=help, description=help, allow_abbrev=False)
        commands[name].set_defaults(run=run)
    finetune = commands["finetune"]
    add_flags(finetune, RunConfig, "files and device")
    add_flags(finetune, LoraConfig, "adapter")
    add_flags(finetune, TrainConfig, "training")
    finetune.add_argument(
        "--config", type=Path, help="a .toml or .json file of these flags; the command line goes on top"
    )
    for name in ("generate", "merge", "eval"):
        _add_model_flags(commands[name], many_adapters=name == "merge")
    _add_generate_flags(commands["generate"])
    commands["merge"].add_argument("--out", required=True, help="directory to write; it must not hold files")
    commands["eval"].add_argument("--data", required=True, help="rows; of a directory, the test split")
    metrics = ("nll", "choice", "exact-match")
    commands["eval"].add_argument(
        "--metric",
        choices=metrics,
        default="nll",
        help="nll: the loss of a labelled token; choice: how often the right one of few answers is the likeliest; "
        "exact-match: how often the answer is written (default: nll)",
    )
    _add_dashed(commands["eval"], "max_length", type=int, default=1024, help="tokens after which a row is cut")
    return parser, commands


def _add_model_flags(parser: argparse.ArgumentParser, many_adapters: bool) -> None:
    parser.add_argument(
        "--model",
        help="directory of the base model (default: the one the adapter was made for, else the built-in one)",
    )
    action, more = ("append", "; give it again for more") if many_adapters else ("store", "")
    parser.add_argument("--adapter", action=action, required=many_adapters, help=f"directory of an adapter{more}")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="number format")
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps; auto: the best there is")


def _add_generate_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompt", required=True, help="what to continue, or to answer if the model has a chat template"
    )
    parser.add_argument("--raw", action="store_true", help="do not use the chat template")
    _add_dashed(parser, "max_new_tokens", type=int, default=64, help="tokens to write at most (default: 64)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token each time (default: 0)")
    _add_dashed(parser, "top_p", type=float, default=1.0, help="sample from so much probability (default: 1)")
    _add_dashed(parser, "top_k", type=int, default=0, help="sample from so many tokens; 0: from all (default: 0)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default: 0)")
    _add_dashed(
        parser, "compare_base", action="store_true", help="also print what the model writes without the adapter"
    )


def _add_dashed(parser: argparse.ArgumentParser, name: str, **options: Any) -> None:
    parser.add_argument(f"--{name.replace('_', '-')}", f"--{name}", **options)


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


def _finetune(options: dict[str, Any]) -> int:
    run = Run(from_flags(RunConfig, options), from_flags(LoraConfig, options), from_flags(TrainConfig, options))
    step = run.prepare()
    model, tokenizer, data, count = run.load()
    run.start(model, data, step)
    weight = model.model.embed_tokens.weight
    _say(
        f"{count.trainable:,} of {count.total:,} parameters are trained ({count.trainable / count.total:.2%}); "
        f"{len(data.train):,} rows to learn from, {len(data.test):,} held out; "
        f"{weight.dtype} on {weight.device}".replace("torch.", "")
    )
    longest, limit = max(len(example.tokens) for example in data.train), model.config.rope.max_length
    if longest > limit:
        _say(f"the longest row has {longest} tokens, and the model was made for {limit}: see --max-length")
    splits = {"training": data.train, "validation": data.valid, "held-out": data.test}
    for name, rows in splits.items():
        if rows.truncated and not (name == "validation" and rows is data.test):
            _say(f"{rows.truncated} {name} rows were cut to --max-length; {rows.unlabelled} of them had no label left")
    if step:
        _say(f"going on from step {step}")
    if data.test:
        _say(f"measuring the base model on {len(data.test):,} rows")
    before = evaluate_base(model, data.test, data.choices)
    meter = Meter()
    previous = signal.signal(signal.SIGINT, meter.stop)
    try:
        result = run.train(model, data, meter)
    finally:
        signal.signal(signal.SIGINT, previous)
        meter.close()
    if not result.finished:
        _say(f"stopped after step {result.steps} of {result.total_steps}; the same command goes on from there")
        return INTERRUPTED
    if data.test:
        _say(f"measuring the adapter on {len(data.test):,} rows")
    outcome = Outcome(result, before, evaluate(model, data.test, data.choices))
    run.finish(model, tokenizer, outcome)
    print(_table(outcome))
    print(f"adapter written to {run.out}")
    return 0


def _generate(options: dict[str, Any]) -> int:
    model, tokenizer = _load(options)
    prompt, is_chat = options["prompt"], tokenizer.template is not None and not options["raw"]
    if is_chat:
        prompt = tokenizer.render([{"role": "user", "content": prompt}], add_generation_prompt=True)
    ids = tokenizer.encode(prompt, add_special_tokens=not is_chat)
    settings = {key: options[key] for key in ("max_new_tokens", "temperature", "top_p", "top_k", "seed")}

    def write() -> str:
        return tokenizer.decode(generate(model, [ids], stop_ids=tokenizer.stop_ids, **settings)[0])

    if not options["compare_base"]:
        print(write())
        return 0
    if not options["adapter"]:
        raise ConfigError("--compare-base needs --adapter")
    with disable_adapter(model):
        print(f"--- base\n{write()}")
    print(f"--- with {options['adapter']}\n{write()}")
    return 0


def _merge(options: dict[str, Any]) -> int:
    out = Path(options["out"])
    if holds_files(out):
        raise ConfigError(f"{out}: holds files; give another --out")
    if options["dtype"] == "auto":  # here the checkpoint's own, even where this machine computes it slowly
        source = read_json(model_directory(_base_of(options)) / "config.json")
        options["dtype"] = source.get("dtype") or source.get("torch_dtype") or "float32"
    model, tokenizer = _load(options)
    merge(model)
    save_model(model, out, tokenizer)
    print(f"merged model written to {out}")
    return 0


def _eval(options: dict[str, Any]) -> int:
    model, tokenizer = _load(options)
    files = find_splits(options["data"])
    rows = read_rows(next(files[split] for split in ("test", "valid", "train") if split in files))
    examples = encode_rows(rows, tokenizer, "completion", options["max_length"])
    if options["metric"] == "nll":
        value = held_out_loss(model, examples)
    elif options["metric"] == "exact-match":
        value = exact_match(model, examples, tokenizer)
    elif choices := find_choices(examples):
        value = choice_accuracy(model, examples, choices)
    else:
        raise ConfigError(f"{options['data']}: --metric choice needs rows with few distinct answers, each given often")
    counts = {"rows": len(examples), "truncated": examples.truncated, "unlabelled": examples.unlabelled}
    print(json.dumps({"metric": options["metric"], "value": value, **counts}))
    return 0


def _load(options: dict[str, Any]) -> tuple[Llama, Tokenizer]:
    """The model of --model and --adapter, all adapters active, and its tokenizer."""
    base = _base_of(options)
    if not options["model"] and _adapters(options) and base != BUILTIN and not Path(base).is_dir():
        raise ConfigError(f"{base}: no such directory, but the adapter names it as its base model; give --model")
    model = load_model(base, options["dtype"], pick_device(options["device"]))
    names = []
    for i, path in enumerate(_adapters(options)):
        names.append(f"adapter{i}")
        load_adapter(model, path, name=names[-1])
    if names:
        set_adapter(model, names)
    return model, load_tokenizer(base)


def _base_of(options: dict[str, Any]) -> str:
    """--model; else what the adapter's file names; else the built-in model."""
    if options["model"] or not _adapters(options):
        return options["model"] or BUILTIN
    paths = [Path(adapter) / CONFIG_FILE for adapter in _adapters(options)]
    bases = [read_json(path).get("base_model_name_or_path") for path in paths]
    if not isinstance(bases[0], str) or not bases[0]:
        raise ConfigError(f"{paths[0]}: names no base model; give --model")
    if any(base != bases[0] for base in bases):
        raise ConfigError(f"the adapters name different base models, {bases}; give --model")
    return bases[0]


def _adapters(options: dict[str, Any]) -> list[str]:
    given = options["adapter"] or []
    return given if isinstance(given, list) else [given]


def _table(outcome: Outcome) -> str:
    def cell(value: float | None) -> str:
        return "-" if value is None else f"{value:.4f}"

    def row(name: str, scores: Scores) -> str:
        return f"{name:<10}{cell(scores.loss):>15}{cell(scores.accuracy):>12}"

    head = f"{'':<10}{'held-out loss':>15}{'accuracy':>12}"
    result = outcome.result
    speed = f"{result.steps} steps, {result.tokens:,} tokens, {result.seconds:.1f} s"
    return "\n".join((head, row("base", outcome.before), row("adapter", outcome.after), speed))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class Meter:
    """Progress on standard error: one rewriting line on a terminal, else a line now and then. Ctrl-C stops the run."""

    def __init__(self, every: float = 5.0):
        self.every = every
        self.is_terminal = sys.stderr.isatty()
        self.is_stopping = False
        self.last = -every
        self.first: tuple[float, int] | None = None

    def __call__(self, record: Record) -> bool:
        if "eval_loss" in record:
            self.show(f"step {record['step']}  held-out loss {record['eval_loss']:.4f}", lasting=True)
            return self.is_stopping
        now = time.monotonic()
        began, first_step = self.first = self.first or (now, record["step"])
        if self.is_terminal or now - self.last >= self.every or record["step"] == record["total_steps"]:
            self.last = now
            done, remaining = record["step"] - first_step, record["total_steps"] - record["step"]
            left = f"{(now - began) / done * remaining:.0f}" if done else "?"
            self.show(
                f"step {record['step']}/{record['total_steps']}  loss {record['loss']:.4f}  "
                f"{record['tokens_per_second']:,.0f} tokens/s  {left} s left  "
                f"{record['peak_memory_bytes'] / 2**30:.2f} GiB"
            )
        return self.is_stopping

    def show(self, text: str, lasting: bool = False) -> None:
        ending = "" if self.is_terminal and not lasting else "\n"
        print(("\r\x1b[K" if self.is_terminal else "") + text, end=ending, file=sys.stderr, flush=True)

    def stop(self, number: int, frame: FrameType | None) -> None:
        """The first Ctrl-C lets the step finish; the second one does not wait."""
        if self.is_stopping:
            raise KeyboardInterrupt
        self.is_stopping = True
        self.show("finishing this step; Ctrl-C again to stop at once", lasting=True)

    def close(self) -> None:
        if self.is_terminal:
            print(file=sys.stderr)
