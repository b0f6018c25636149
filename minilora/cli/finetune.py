"""Train an adapter, or with --method full all weights, on rows of data.

The model is measured before and after. Without --model and --data, a built-in
model and data are used, and it takes less than a minute. --dry-run shows what
a run would learn. The same command, given again, continues a run that was
stopped.

Example:
  minilora finetune --model path/to/model --data rows.jsonl --out run --dry-run
"""

from __future__ import annotations

import argparse
import signal
from collections.abc import Iterator, Sequence
from contextlib import closing, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch

from minilora.adapter import disable_adapter
from minilora.adapters.attach import count_parameters, describe_base
from minilora.adapters.config import FLAG_NAMES, LoraConfig
from minilora.adapters.layout import read_adapter
from minilora.cli import SIGNALLED, Options, describe_skipped, say
from minilora.cli.flags import add_fields, from_flags, read_config, use_config
from minilora.cli.forecast import memory_lines, preview
from minilora.cli.load import base_notes, base_of, check_not_merged, recorded_quantization
from minilora.errors import ConfigError
from minilora.llama import Llama
from minilora.models.bitsandbytes import QuantizeConfig
from minilora.models.checkpoint import stored_dtype
from minilora.models.hub import fetch
from minilora.models.prompts import PROMPTS_FILE, Prompts, read_prompt_files
from minilora.runs import world
from minilora.runs.config import DataConfig, RunConfig, TrainConfig
from minilora.runs.dataset import Dataset
from minilora.runs.evaluate import Drift, Scores, evaluate, measure_drift, write_samples
from minilora.runs.inputs import Data
from minilora.runs.loop import Record, TrainResult, train
from minilora.runs.machine import free_memory_bytes, held_memory_bytes
from minilora.runs.memory import check_memory, check_room
from minilora.runs.reports import ProgressBar, beginning, ending
from minilora.runs.run import Run
from minilora.runs.seeded import plan_steps
from minilora.storage import ASSETS, BUILTIN, read_json

FEW_STEPS, FEW_ROWS = 50, 10


def add_flags(parser: argparse.ArgumentParser) -> None:
    add_fields(parser, RunConfig, "files and device")
    add_fields(parser, QuantizeConfig, "quantization")
    add_fields(parser, LoraConfig, "adapter", but=("task_type",))
    add_fields(parser, DataConfig, "data")
    add_fields(parser, TrainConfig, "training")
    parser.add_argument(
        "--config", type=Path, help="a .toml or .json file of these flags; flags on the command line override it"
    )
    parser.add_argument("--dry-run", action="store_true", help="show rows, labels, steps and memory, without training")
    parser.add_argument("--force", action="store_true", help="train even if memory or disk space may not suffice")


def prepare(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Set the values of --config and --adapter as defaults or, without --model and --data, the built-in example's.

    Raises:
        ConfigError: a model without data, or data without a model.
    """
    flags = vars(parser.parse_known_args(words)[0])
    path = flags["config"]
    values = read_config(path) if path is not None else {}
    values = values["config"] if isinstance(values.get("config"), dict) else values  # where run.json has them
    given = {word.partition("=")[0].removeprefix("--") for word in words if word.startswith("--")}
    model, adapter = (flags[name] if name in given else values.get(name) for name in ("model", "adapter"))
    named = {*given, *values, *(["model"] if adapter else [])}
    if len(named & {"model", "data"}) == 1:
        lacking = "--data" if "model" in named else "--model"
        raise ConfigError(
            f"--model and --data go together: give {lacking}, too; {lacking} {BUILTIN} is the built-in one"
        )
    if not named & {"model", "data"}:
        use_config(parser, read_json(ASSETS / "finetune.json"), "finetune.json")
    if adapter:
        directory = fetch(adapter, "adapter")
        model = base_of(model, [directory])
        quantize = recorded_quantization(fetch(model, "model"), [directory]) or QuantizeConfig()
        prompts = Prompts.parse(read_prompt_files(directory).get(PROMPTS_FILE, "{}"), PROMPTS_FILE)
        settings = {**vars(quantize), **vars(read_adapter(directory).config()), "system": prompts.system}
        parser.set_defaults(model=model, **{FLAG_NAMES.get(name, name): value for name, value in settings.items()})
    use_config(parser, values, str(path))


def run(options: Options) -> int:
    with world.joined(options["device"]) as device:
        run = Run(
            from_flags(RunConfig, options),
            from_flags(QuantizeConfig, options),
            from_flags(LoraConfig, options),
            from_flags(DataConfig, options),
            from_flags(TrainConfig, options),
        )
        check_not_merged(run.base, run.adapters)
        with closing(run):
            return _dry_run(run, device, options) if options["dry_run"] else _finetune(run, device, options)


def _finetune(run: Run, device: torch.device, options: Options) -> int:
    step = run.prepare()
    with closing(ProgressBar()) as bar:
        data = run.read_data(bar.show)
    plan, memory = run.fit_to_memory(data, device)
    if not options["force"]:
        check_memory(plan, memory)
    run.claim(data)
    if run.earlier.is_finished:
        say(f"{run.out}: holds this run, which is finished, so nothing is left to do; {run.further}")
        return 0
    if world.is_first() and not options["force"]:
        check_room(run.out, memory)
    model = run.load_base(data, device)
    run.attach_adapter(model, data)
    _start(run, model, data, step, options["config"])
    made = "model" if run.is_full else "adapter"
    bar = ProgressBar("held-out" if data.valid is data.test else "validation")
    with nullcontext() if run.is_full else disable_adapter(model):
        before, base_samples = _measure(run, model, data, bar, "base model")
    result = _train_until_signal(run, model, data, bar)
    if not result.finished:
        bar.close()
        say(f"stopped after step {result.steps} of {result.total_steps}; the same command resumes it")
        world.barrier()  # the first rank has said so before another one ends
        return SIGNALLED + (bar.stopped_by or signal.SIGTERM)  # which another rank got
    if result.steps < result.total_steps:
        say(f"stopped early: no new lowest loss in {run.training.early_stopping} evaluations")
    if result.kept != result.steps:
        say(f"the {made} of step {result.kept} had the lowest loss of all evaluations and is the one kept")
    after, samples = _measure(run, model, data, bar, made)
    drift = None
    if data.general:
        base: Any = run.load_base(data, device) if run.is_full else None
        drift = measure_drift(model, data.general, bar.rows("measuring general text"), base)
    bar.close()
    if world.is_first():
        run.finish(model, data.tokenizer, result, before, after, drift)
    print(_table(made, result, before, after, drift), flush=True)
    for old, new in zip(base_samples, samples, strict=True):
        lines = [f"  {name:<8}-> {beginning(sample['text'])}" for name, sample in {"base": old, made: new}.items()]
        say("\n".join([ending(old["prompt"], 60), *lines]))
    print(f"{made} written to {run.out}")
    return 0


def _dry_run(run: Run, device: torch.device, options: Options) -> int:
    """Show what the run would learn, with a model that has no storage, and how much memory it would take."""
    with closing(ProgressBar()) as bar:
        data = run.read_data(bar.show)
    plan, memory = run.fit_to_memory(data, device)
    model = run.load_base(data, "meta")
    run.attach_adapter(model, data)
    for note in _notes(run, model, data):
        say(note)
    print(preview(data, run.training, count_parameters(model)))
    print(memory_lines(memory, held_memory_bytes(plan.device), free_memory_bytes(plan.device)))
    if not options["force"]:
        check_memory(plan, memory)
    return 0


def _start(run: Run, model: Llama, data: Data, step: int, config: Path | None) -> None:
    """Record the start, and say what the run begins with."""
    available, weight, count = torch.get_num_threads(), model.model.embed_tokens.weight, count_parameters(model)
    if threads := run.set_threads(model, data):
        say(f"using {threads} of {available} threads (measured as faster); OMP_NUM_THREADS chooses another number")
    if world.is_first():
        run.start(model, data, step)
    stored, reason = stored_dtype(run.base_config.source), ""
    if run.dtype == "auto" and weight.dtype == torch.float32 and stored != "float32":
        reason = f", since bfloat16 is slow there (the model is stored in {stored})"
    say(
        f"{count.trainable:,} of {count.total:,} parameters are trained ({count.trainable / count.total:.2%})\n"
        f"{len(data.train):,} rows to learn from, {len(data.test):,} held out; "
        f"batches of {run.training.batch_size}, learning rate {run.training.learning_rate:g}\n"
        f"{weight.dtype} on {weight.device}{reason}".replace("torch.", "")
    )
    for note in _notes(run, model, data):
        say(note)
    if config and read_config(config).get("data_sha256", data.files) != data.files:
        say(f"the data are not those that {config} was written with")
    for found in run.earlier.damaged:
        say(f"skipped a damaged checkpoint: {found}")
    if step:
        say(f"resuming from step {step}")
    elif run.earlier.starts:
        stopped = "the run was stopped before its first checkpoint"
        say(f"starting again at step 0: {'no other checkpoint is left' if run.earlier.damaged else stopped}")


def _notes(run: Run, model: Llama, data: Data) -> Iterator[str]:
    """Yield how the base is quantized, what is unusual about the rows, and which recomputation was chosen."""
    yield from base_notes(run.base, run.adapters, describe_base(model))
    longest, limit = data.train.lengths.max(), model.config.max_position_embeddings
    if longest > limit:
        yield f"the longest row has {longest} tokens, and the model was made for {limit}: see --max-length"
    if run.data_config.prompt_style != "auto" and not data.train.conversations:
        yield "no training row is a conversation, so --prompt-style has no effect"
    elif data.train.completions and data.tokenizer.template:
        yield (
            f"{data.train.completions} training rows are a plain prompt and completion, for which the model's chat "
            "template is not used; write them as `messages` to use it"
        )
    if 0 < len(data.test) < FEW_ROWS:
        rows_are = "row is" if len(data.test) == 1 else "rows are"
        yield (
            f"{len(data.test)} {rows_are} held out, too few for their loss or accuracy to say much; "
            "--eval-split or --eval-data gives more"
        )
    if data.train.touching > data.train.completions / 2:
        yield (
            f"{data.train.touching} training rows have no white space between prompt and completion; "
            "end the prompts, or begin the completions, with a space or a line end"
        )
    steps = len(plan_steps(data.train.lengths, run.training))
    parts = run.training.gradient_accumulation_steps
    if world.size() > 1:
        held = "a part" if run.shard == "base" else "the whole"
        yield f"{world.size()} processes, each with {held} of the base; micro-batches of a step: {parts}"
    if parts < world.size():
        yield (
            "some processes have nothing to do: a larger --gradient-accumulation-steps, with a smaller --batch-size, "
            "gives each its part"
        )
    if steps < FEW_STEPS:
        yield f"the run has few steps ({steps}), which may teach little; --epochs gives more"
    for name, rows in data.splits.items():
        yield from _row_notes(name, rows)
    if run.resolved["gradient_checkpointing"] == "auto":
        way = run.training.gradient_checkpointing
        yield f"--gradient-checkpointing {way}: the fastest way for which there is memory"


def _row_notes(name: str, rows: Dataset) -> Iterator[str]:
    """Yield how many rows of a split were cut, quote control tokens, or were skipped."""
    if rows.truncated:
        yield f"{rows.truncated} {name} rows were cut to --max-length; {rows.unlabelled} of them had no label left"
    if rows.quoted:
        yield (
            f"{rows.quoted} {name} rows have control tokens in their text, which are taken as plain text; "
            "--allow-special makes them act"
        )
    if rows.moved:
        yield (
            f"in {rows.moved} {name} rows the chat template writes other text before an answer than where it asks for "
            "one; the answer is learned after the text that asks for it"
        )
    if rows.bad:
        yield describe_skipped(f"{name} ", rows.bad)


def _train_until_signal(run: Run, model: Llama, data: Data, bar: ProgressBar) -> TrainResult:
    """Train, with samples of what the model writes at each evaluation; Ctrl-C and SIGTERM let the step finish."""

    def on_step(record: Record) -> bool:
        if "eval_loss" in record:
            record = {**record, "samples": _samples(run, model, data, data.valid)}
        stops = bar(record)
        run.log(record)
        return stops

    previous = {number: signal.signal(number, bar.stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return train(model, data.train, run.training, on_step, data.valid, run.out / "checkpoints")
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _measure(run: Run, model: Llama, data: Data, bar: ProgressBar, name: str) -> tuple[Scores, list[dict[str, str]]]:
    """Evaluate a model on the held-out rows, and let it answer the first of them."""
    scores = evaluate(model, data.test, data.choices, partial(bar.rows, f"measuring the {name}"))
    return scores, _samples(run, model, data, data.test)


def _samples(run: Run, model: Llama, data: Data, rows: Dataset) -> list[dict[str, str]]:
    """Return the first held-out prompts with the model's answers."""
    return write_samples(model, data.tokenizer, rows[: run.config.samples])


def _table(made: str, result: TrainResult, before: Scores, after: Scores, drift: Drift | None) -> str:
    lines = [f"{'':<10}{'held-out loss':>15}" + ("" if after.accuracy is None else f"{'accuracy':>12}")]
    for name, scores in {"base": before, made: after}.items():
        loss = "-" if scores.loss is None else f"{scores.loss:.4f}"
        lines.append(f"{name:<10}{loss:>15}" + ("" if scores.accuracy is None else f"{scores.accuracy:>12.4f}"))
    if drift:
        lines.append(f"general text: loss {drift.before:.4f} -> {drift.after:.4f}, KL to the base {drift.kl:.4f}")
    return "\n".join([*lines, f"{result.steps} steps, {result.tokens:,} tokens, {result.seconds:.1f} s"])
