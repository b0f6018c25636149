"""minilora finetune: train an adapter, or all weights."""

from __future__ import annotations

import signal

import torch

from minilora.adapters.attach import disable_adapter
from minilora.adapters.config import LoraConfig
from minilora.adapters.find import ParameterCount, base_held
from minilora.cli.command import INTERRUPTED, Options, say, say_bad
from minilora.cli.flags import from_flags, read_config
from minilora.cli.load import say_quantization
from minilora.cli.memory import memory_lines
from minilora.cli.meter import Meter
from minilora.cli.preview import preview
from minilora.errors import ConfigError
from minilora.models.classifier import Classifier
from minilora.models.llama import Llama
from minilora.models.quantization import QuantizeConfig
from minilora.runs.config import DataConfig, TrainConfig
from minilora.runs.diagnose import free_memory_bytes, held_memory_bytes
from minilora.runs.evaluate import ClassScores, Progress, Scores, evaluate, evaluate_classes, measure_drift
from minilora.runs.inputs import Data
from minilora.runs.loop import TrainResult
from minilora.runs.run import Outcome, Run, pick_device
from minilora.runs.run_memory import check_memory
from minilora.runs.settings import RunConfig


def run(options: Options) -> int:
    where = from_flags(RunConfig, options)
    reading, training = from_flags(DataConfig, options), from_flags(TrainConfig, options)
    quantization = from_flags(QuantizeConfig, options)
    if quantization.quantize == "none" and quantization != QuantizeConfig():
        raise ConfigError("--quantize-skip and --no-double-quant are without effect; give --quantize nf4, too")
    run = Run(where, quantization, from_flags(LoraConfig, options), reading, training)
    step = 0 if options["dry_run"] else run.prepare()
    model, data, count = run.load(options["force"], options["dry_run"])
    say_quantization(base_held(model), ())
    if options["dry_run"]:
        _tell(model, data, run.reading)
        print(preview(data, run.training, count))
        device = pick_device(where.device)
        found = run.fit(data, device)
        print(memory_lines(found, held_memory_bytes(device), free_memory_bytes(device)))
        _tell_recompute(training, run.training)
        if not options["force"]:
            check_memory(run, data, device, found)
        return 0
    available = torch.get_num_threads()
    if threads := run.choose_threads(model, data):
        say(f"using {threads} of {available} threads (measured as faster); OMP_NUM_THREADS chooses another number")
    run.start(model, data, step)
    _say_size(model, data, count)
    _tell(model, data, run.reading)
    _tell_recompute(training, run.training)
    if options["config"] and read_config(options["config"]).get("data_sha256", data.files) != data.files:
        say(f"the data are not those that {options['config']} was written with")
    if step:
        say(f"going on from step {step}")
    elif run.has_begun:
        say("starting anew: the run was stopped before its first checkpoint")
    made = "model" if run.is_full else "adapter"
    meter = Meter("held-out" if data.valid is data.test else "validation")
    with disable_adapter(model):
        before = _measured(model, data, meter.rows("measuring the base model"))
    result = _train(run, model, data, meter)
    if not result.finished:
        meter.close()
        say(f"stopped after step {result.steps} of {result.total_steps}; the same command goes on from there")
        return INTERRUPTED
    if result.steps < result.total_steps:
        say(f"stopped early: no new lowest loss in {run.training.early_stopping} evaluations")
    if result.kept != result.steps:
        say(f"the {made} of step {result.kept} had the lowest loss of all evaluations and is the one kept")
    after = _measured(model, data, meter.rows(f"measuring the {made}"))
    drift = None
    if data.general and isinstance(model, Llama):
        device = next(model.parameters()).device
        base = run.base_for(data, run.dtype, device, run.quantization) if run.is_full else None
        assert not isinstance(base, Classifier)  # as the model is none
        drift = measure_drift(model, data.general, meter.rows("measuring general text"), base)
    meter.close()
    outcome = Outcome(result, before, after, drift)
    run.finish(model, data, outcome)
    print(_table(outcome, made))
    print(f"{made} written to {run.out}")
    return 0


def _tell_recompute(asked: TrainConfig, chosen: TrainConfig) -> None:
    if asked.recompute == "auto":
        say(f"--recompute {chosen.recompute}: the fastest way for which there is memory")


def _measured(model: Llama | Classifier, data: Data, progress: Progress) -> Scores | ClassScores:
    if isinstance(model, Classifier):
        return evaluate_classes(model, data.test, progress)
    return evaluate(model, data.test, data.choices, progress)


def _train(run: Run, model: Llama | Classifier, data: Data, meter: Meter) -> TrainResult:
    """Train; Ctrl-C lets the step finish."""
    previous = signal.signal(signal.SIGINT, meter.stop)
    try:
        return run.train(model, data, meter)
    finally:
        signal.signal(signal.SIGINT, previous)


def _say_size(model: Llama | Classifier, data: Data, count: ParameterCount) -> None:
    weight = model.model.embed_tokens.weight
    say(
        f"{count.trainable:,} of {count.total:,} parameters are trained ({count.trainable / count.total:.2%}); "
        f"{len(data.train):,} rows to learn from, {len(data.test):,} held out; "
        f"{weight.dtype} on {weight.device}".replace("torch.", "")
    )


def _tell(model: Llama | Classifier, data: Data, reading: DataConfig) -> None:
    """What is unusual about the rows."""
    longest, limit = max(len(example.tokens) for example in data.train), model.config.rope.max_length
    if longest > limit:
        say(f"the longest row has {longest} tokens, and the model was made for {limit}: see --max-length")
    if reading.prompt_style != "auto" and not data.train.conversations:
        say("no training row is a conversation, so --prompt-style has no effect")
    for name, rows in data.splits.items():
        if rows.truncated:
            say(f"{rows.truncated} {name} rows were cut to --max-length; {rows.unlabelled} of them had no label left")
        if rows.quoted:
            say(
                f"{rows.quoted} {name} rows have control tokens in their text, which are taken as plain text; "
                "--allow-special makes them act"
            )
        if rows.bad:
            say_bad(f"{name} ", rows.bad)


def _table(outcome: Outcome, made: str) -> str:
    def row(name: str, scores: Scores | ClassScores) -> str:
        values = [scores.loss, scores.accuracy, *([scores.macro_f1] if isinstance(scores, ClassScores) else [])]
        cells = ["-" if value is None else f"{value:.4f}" for value in values]
        return f"{name:<10}{cells[0]:>15}" + "".join(f"{cell:>12}" for cell in cells[1:])

    head = f"{'':<10}{'held-out loss':>15}{'accuracy':>12}"
    head += f"{'macro F1':>12}" if isinstance(outcome.after, ClassScores) else ""
    result, drift = outcome.result, outcome.drift
    lines = [head, row("base", outcome.before), row(made, outcome.after)]
    if drift:
        lines.append(f"general text: loss {drift.before:.4f} -> {drift.after:.4f}, KL to the base {drift.kl:.4f}")
    return "\n".join([*lines, f"{result.steps} steps, {result.tokens:,} tokens, {result.seconds:.1f} s"])
