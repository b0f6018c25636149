"""Train an adapter on rows of data.

The model is measured before and after. Without --model and --data, a built-in
model and data are used, with --learning-rate 0.002, --batch-size 16 and
--epochs 4, and it takes about a minute. --dry-run shows the rows, labels,
steps and memory of a run. Give the same command again to continue a run that
was stopped.

Example:
  minilora finetune --model path/to/model --data rows.jsonl --out run --dry-run
"""

import signal
from collections.abc import Collection
from contextlib import ExitStack, closing
from dataclasses import fields, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from minilora.adapter import disable_adapter
from minilora.adapters.attach import attach, count_parameters
from minilora.adapters.config import LoraConfig
from minilora.adapters.files import load_adapter
from minilora.adapters.layout import read_adapter
from minilora.cli import FOREIGN_FLAGS, SIGNALLED, Options, Parser, address_of, closest_name, say
from minilora.cli.dry_run import dry_run_lines, preview
from minilora.cli.flags import add_fields, from_flags, read_config_file
from minilora.cli.load import base_of, check_not_merged, recorded_quantization, run_settings
from minilora.cli.messages import report, run_notes, say_start
from minilora.errors import ConfigError
from minilora.files import ASSETS, BUILTIN, read_json
from minilora.llama import Llama
from minilora.models.bitsandbytes import QuantizeConfig
from minilora.models.checkpoint import load_model, resolve_dtype
from minilora.models.config import read_config
from minilora.models.fsdp import load_sharded
from minilora.models.hub import locate
from minilora.models.prompts import read_prompts
from minilora.runs import processes
from minilora.runs.directory import Base, Run, RunDirectory, RunHistory, RunSummary, check_same
from minilora.runs.evaluate import answer, evaluate, measure_forgetting
from minilora.runs.inputs import Data, read_data
from minilora.runs.loop import Record, TrainResult, train
from minilora.runs.memory import Forecasts, Plan, check_memory, choose_plan, kept_memory, peak_memory_bytes
from minilora.runs.reports import ProgressBar
from minilora.runs.settings import FLAG_NAMES, DataConfig, RunConfig, Settings, TrainConfig, flag

MAIN_FLAGS = (  # what --help shows; --help-all shows all
    *("model", "data", "eval_data", "out", "adapter", "quantize", "r", "lora_alpha", "target_modules"),
    *("columns", "system", "prompt_style", "train_on", "skip_bad_rows", "learning_rate", "batch_size", "epochs"),
    *("max_steps", "eval_split", "eval_steps", "keep", "max_length", "gradient_checkpointing"),
)
CONFIGS: dict[type[Any], str] = {  # and their titles on the help page
    RunConfig: "files and device",
    QuantizeConfig: "quantization",
    LoraConfig: "adapter",
    DataConfig: "data",
    TrainConfig: "training",
}
FIELDS = {field.name for config in CONFIGS for field in fields(config)} - {"task_type"}  # it trains language models


def add_flags(parser: Parser, names: Collection[str] = FIELDS) -> None:
    """Add the flags of these fields, and those that are no settings."""
    for config, title in CONFIGS.items():
        add_fields(parser, config, title, but={field.name for field in fields(config)} - {*names})
    parser.add_argument("--help-all", action="help", help="show all flags and exit")
    parser.add_argument("--config", type=Path, help="a .toml or .json file of flags; the command line overrides it")
    parser.add_argument("--dry-run", action="store_true", help="show three rows, steps and memory, and do not train")
    parser.add_argument(
        "--force", action="store_true", help="train even if the forecast says that there is too little memory"
    )


def read_settings(options: Options) -> Settings:
    """Return the settings that flags give, else --config, else the adapter to continue, else the built-in example."""
    file = {} if options["config"] is None else read_config_file(options["config"])
    file = file["config"] if isinstance(file.get("config"), dict) else file  # run.json has its settings there
    known = {FLAG_NAMES.get(name, name) for name in FIELDS}
    bad = []
    for key in (key for key in file if key.replace("-", "_") not in known):
        advice = FOREIGN_FLAGS.get(f"--{key.replace('_', '-')}") or closest_name(key, known)
        bad.append(f"key {key!r} is unknown; {advice or 'the keys are the flags of `minilora finetune --help-all`'}")
    if bad:
        raise ConfigError(f"{options['config']}: " + "\n".join(bad))
    file = {name.replace("-", "_"): value for name, value in file.items()}
    given = {name: value for source in (file, options) for name, value in source.items() if value is not None}
    has_data = given.get("data") not in (None, BUILTIN, [BUILTIN])
    has_model = given.get("model", given.get("adapter")) not in (None, BUILTIN)
    if has_data and given.keys().isdisjoint({"model", "adapter"}):
        need = f"a directory, a name on the Hub, such as HuggingFaceTB/SmolLM2-135M-Instruct, or {BUILTIN}"
        raise ConfigError(f"--data needs --model: {need}; see {address_of('laptop.md#what-fits')}")
    others = {} if has_data or has_model else read_json(ASSETS / "finetune.json")
    if has_model and "data" not in given:
        say("no --data given: training on the built-in rows")
    if given.get("adapter"):
        others = _settings_of(given["adapter"], given.get("model"))
    return Settings(*(from_flags(config, given, others) for config in CONFIGS))


def _settings_of(adapter: str, model: str | None) -> dict[str, Any]:
    """Return the settings by which an adapter continues its training."""
    directory = locate(adapter, "adapter").path
    model = base_of(model, [directory])
    quantization = recorded_quantization(locate(model, "model").path, [directory])
    adapted = read_adapter(directory, is_for_text=True).config()
    columns = run_settings({"adapter": [adapter]}).get("columns")
    settings = {"model": model, **quantization, **vars(adapted), "columns": columns}
    return {FLAG_NAMES.get(name, name): value for name, value in settings.items()}


def find_inputs(settings: Settings) -> tuple[Settings, Base]:
    """Return the settings with the commit of each repository in its name, and the model and the adapter they name."""
    run = settings.run
    model = locate(run.model, "model")
    adapter = None if run.adapter is None else locate(run.adapter, "adapter")
    run = replace(run, model=model.name, adapter=adapter and adapter.name)
    base = Base(model, (adapter.path,) if adapter else (), read_config(model.path))
    # What a run starts from, a merged model as well, has the system prompt that it was trained with.
    system = read_prompts(*base.adapters, model.path).system if settings.data.system is None else settings.data.system
    return replace(settings, run=run, data=replace(settings.data, system=system)), base


def check_settings(settings: Settings, base: Base) -> None:
    """Check that the library for the metrics is there, and what is trained against what the run starts from."""
    tracker = settings.run.report
    if tracker != "none" and find_spec(tracker) is None:
        raise ConfigError(f"--report {tracker} needs the package {tracker}: pip install {tracker}")
    for directory in base.adapters:
        check_not_merged(base.location, [directory])
        own = read_adapter(directory, is_for_text=True).config()
        pairs = {name: (value, getattr(own, name)) for name, value in vars(settings.lora).items()}
        if bad := [f"{flag(name)} {a!r:.80} (it has {b!r:.80})" for name, (a, b) in pairs.items() if a != b]:
            raise ConfigError(f"--adapter {directory}: leave out what the adapter determines: {', '.join(bad)}")


def plan_run(settings: Settings, base: Base, data: Data, dtype: str, device: torch.device) -> Plan:
    """Return what a run is asked to do; its gradient checkpointing may be "auto"."""
    ranks = processes.size()
    return Plan(
        base.config,
        settings.lora,
        settings.training,
        settings.quantization,
        resolve_dtype(dtype, base.config.source, device),
        device,
        [(len(example.tokens), example.labelled) for example in data.train],
        ranks,
        "none" if ranks == 1 else settings.run.shard,
    )


def load_adapted(plan: Plan, base: Base, device: torch.device | str) -> Llama:
    """Load the base model, quantized while it is read, and attach a new adapter, or the one to start from.

    On the device "meta" the model has no storage.
    """
    load = load_model if plan.shard == "none" or device == "meta" else load_sharded
    model = load(base.location.name, plan.dtype, device, plan.quantization)
    if base.adapters:
        load_adapter(model, base.adapters[0], trainable=True)
    elif plan.lora is not None:
        attach(model, plan.lora, seed=plan.training.seed)
    return model


def run(options: Options) -> int:
    """Fine-tune, call by call as in the diagram of docs/internals/architecture.md."""
    is_dry = options["dry_run"]
    with processes.process_group(options["device"]) as device, ExitStack() as stack:
        settings, base = find_inputs(read_settings(options))
        directory = stack.enter_context(closing(RunDirectory(settings)))
        check_settings(settings, base)
        history = RunHistory(settings.run.dtype) if is_dry else directory.open(base)
        bar = stack.enter_context(ProgressBar())
        data = read_data(settings, base.adapters, history.began, bar.show)  # a chat template may write the date
        bar.close()
        if history.starts:
            check_same(f"{directory.path}: the data", history.data_sha256, data.files)
        plan, memory = choose_plan(plan_run(settings, base, data, history.dtype, device))
        run = Run(settings, base, history, data, plan)
        if is_dry:
            return _dry_run(run, memory, options)
        if not options["force"]:
            check_memory(plan, memory)
        if history.is_finished:
            say(
                f"{directory.path}: this run is finished; for another run give another --out; "
                f"to train its adapter further, add --adapter {directory.path}"
            )
            return 0
        bar.show("loading the model", 0, 1)
        model = load_adapted(plan, base, device)
        bar.close()
        processes.run_on_rank0(directory.start, run, model)
        say_start(run, model)
        bar.evaluated = "held-out" if data.valid is data.test else "validation"
        with disable_adapter(model):
            before = evaluate(model, data.test, data.choices, partial(bar.show, "measuring the base model: row"))
        start = None
        if base.adapters:
            start = evaluate(model, data.test, data.choices, partial(bar.show, "measuring the start: row"))
        bar.show("first step", 0, 1)
        result = _train_until_signal(run, directory, model, bar)
        if not result.finished:
            bar.close()
            stopped = f"stopped after step {result.steps} of {result.total_steps}; the same command resumes it"
            processes.run_on_rank0(say, stopped)  # before another rank ends
            return SIGNALLED + (bar.stopped_by or signal.SIGTERM)  # which another rank got
        after = evaluate(model, data.test, data.choices, partial(bar.show, "measuring the adapter: row"))
        forgetting = measure_forgetting(model, data.general, partial(bar.show, "measuring general text: row"))
        progress = partial(bar.show, "answering held-out rows: row")
        answers = answer(model, data.tokenizer, data.questions, settings.run.samples, progress)
        totals = (result.steps, result.kept, result.tokens, result.seconds, peak_memory_bytes(device))
        summary = RunSummary(before, start, after, forgetting, *totals)
        processes.run_on_rank0(directory.finish, model, data.tokenizer, summary, answers)
        report(run, result, summary, answers)
        return 0


def _dry_run(run: Run, memory: Forecasts, options: Options) -> int:
    """Show what the run would learn, with a model that has no storage, and what memory it would take."""
    model = load_adapted(run.plan, run.base, "meta")
    for note in run_notes(run, model):
        say(note)
    print(preview(run.data, run.plan.training, count_parameters(model)))
    print(dry_run_lines(run.plan, memory))
    if not options["force"]:
        check_memory(run.plan, memory)
    return 0


def _train_until_signal(run: Run, directory: RunDirectory, model: Llama, bar: ProgressBar) -> TrainResult:
    """Train with records and progress; Ctrl-C and SIGTERM let the step finish."""

    def on_step(record: Record) -> bool:
        stops = bar(record)
        directory.log(record)
        return stops

    previous = {number: signal.signal(number, bar.stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        folder = directory.path / "checkpoints"
        held_out = run.data.valid if run.plan.training.eval_steps else ()
        # Between the blocks of a sharded base, which are gathered in turn, kept memory would be in pieces.
        with kept_memory(2**20 if run.plan.shard == "base" else 2**25):
            return train(model, run.data.train, run.plan.training, on_step, held_out, folder)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
