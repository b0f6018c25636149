"""One fine-tuning run and its directory.

OUT/adapter_config.json  adapter_model.safetensors   the adapter, in PEFT's layout; or, with --method full,
    config.json  model….safetensors                  the whole model
    metrics.jsonl                                    a JSON object a step
    summary.json                                     before, after, totals
    run.json                                         the resolved configuration, versions, data, every start
    minilora-manifest.json                           sizes and hashes of the files above, once the run is finished
    checkpoints/                                     from which the run can be resumed
    tokenizer.json …                                 the tokenizer's files
    .lock                                            the process that is at work there, or was the last one
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

import torch

from minilora.adapters.attach import attach
from minilora.adapters.config import LoraConfig
from minilora.adapters.files import load_adapter, save_adapter
from minilora.adapters.layout import tokenizer_of
from minilora.definition import is_plain
from minilora.durable import (
    MANIFEST,
    append_line,
    holds_files,
    lock,
    publishing,
    remove,
    without_nan,
    write_json,
    write_text,
)
from minilora.errors import ConfigError, TrainingError
from minilora.llama import Llama
from minilora.models.bitsandbytes import QuantizeConfig
from minilora.models.checkpoint import load_model, read_config, resolve_dtype, save_model
from minilora.models.hub import fetch, locate
from minilora.models.prompts import PROMPTS_FILE, Prompts, copy_prompt_files
from minilora.models.shard import load_sharded
from minilora.models.tokenizer import Tokenizer, load_tokenizer
from minilora.models.vocabulary import resize_token_embeddings
from minilora.runs import checkpoints, world
from minilora.runs.config import DataConfig, RunConfig, TrainConfig, check_settings, resolve
from minilora.runs.dataset import sizes_of
from minilora.runs.encoders import use_prompt_style
from minilora.runs.evaluate import Drift, Scores, find_choices
from minilora.runs.inputs import Data, encode_files, find_files, hash_files, hold_out, load_general, stream_rows
from minilora.runs.loop import Record, TrainResult
from minilora.runs.machine import choose_threads, peak_memory_bytes
from minilora.runs.memory import Forecast, choose_plan
from minilora.runs.reports import read_records, read_run_record
from minilora.runs.seeded import plan_steps
from minilora.runs.sizes import Plan, Shard
from minilora.runs.tracking import Tracker
from minilora.storage import MODEL_FILES

HASHED = ("out", "model", "adapter", "data", "eval_data")  # paths may change: contents are compared by their hashes
FREE = ("resume", "shard", "report", "samples", "general_data")  # may change, as may what `bookkeeping` names
PACKAGES = ("minilora", "torch", "safetensors", "tokenizers", "numpy", "jinja2", "huggingface_hub")


@dataclass(frozen=True)
class Earlier:
    """What a directory holds of the earlier starts of a run; nothing of a new one."""

    starts: tuple[dict[str, Any], ...] = ()  # as run.json has them
    data_sha256: Mapping[str, str] = field(default_factory=dict)
    checkpoint: Path | None = None  # the newest that is whole, from which the run resumes
    damaged: tuple[str, ...] = ()  # what is wrong with newer ones
    is_finished: bool = False


class Run:
    """A run and its directory, from `prepare` to `finish` and `close`.

    Where a run has several ranks each has such an object, and only the first reads and writes the directory.
    """

    def __init__(
        self,
        run: RunConfig,
        quantization: QuantizeConfig,
        lora: LoraConfig,
        data_config: DataConfig,
        training: TrainConfig,
    ):
        run = run.located()
        self.config, self.quantization, self.lora = run, quantization, lora
        self.data_config, self.training = data_config, training
        self.resolved = resolve(run, quantization, lora, data_config, training)
        self.out, self.is_full = Path(run.out), run.method == "full"
        self.dtype = "float32" if self.is_full else run.dtype
        self.base = locate(run.model, "model")
        self.adapters = [fetch(run.adapter, "adapter")] if run.adapter else []
        self.base_config = read_config(self.base.path)
        self.began = world.broadcast(datetime.now(UTC).replace(microsecond=0))  # a chat template may write the date
        self.earlier = Earlier()
        self.inputs: dict[str, str] = {}  # hashes of the base and other files
        self.shard: Shard = "none"
        self.tracker: Tracker | None = None
        self.lock_file: TextIO | None = None
        check_settings(run, quantization, lora, training, self.base_config)

    def prepare(self) -> int:
        """Check that the directory is new, or holds this run and can be locked; return the step to resume from.

        A finished run may be made longer, see `check_extension`.
        """
        self.inputs = checkpoints.hash_inputs(self.base.path, self.adapters, self.data_config.prompt_style)
        found = world.all_gather(self.inputs)
        if different := {name for each in found for name, _ in each.items() ^ found[0].items()}:
            raise TrainingError(f"the processes of the run have different files: {', '.join(sorted(different)[:5])}")
        self.earlier = world.from_first(self._read_earlier)
        if self.earlier.starts:
            first = self.earlier.starts[0]
            self.began = datetime.fromisoformat(first["time"])
            self.dtype = first["dtype"] if self.dtype == "auto" else self.dtype  # auto differs between machines
        return checkpoints.step_of(self.earlier.checkpoint)

    def _read_earlier(self) -> Earlier:
        """Lock a directory that holds a run; raise a TrainingError if it is not this one."""
        if not holds_files(self.out):
            return Earlier()
        path = self.out / "run.json"
        if not path.is_file():
            raise TrainingError(f"{self.out}: has files, but not of a run; give another --out")
        self.lock_file = lock(self.out)
        checkpoint, damaged = checkpoints.newest_checkpoint(self.out / "checkpoints")
        record = read_run_record(path)
        before, now = record.config, json.loads(json.dumps(self.resolved))
        is_extended = checkpoint and any(before.get(key) != now[key] for key in ("epochs", "max_steps"))
        is_finished = (self.out / "summary.json").is_file() and not is_extended
        if self.config.resume == "never":
            raise TrainingError(f"{self.out}: holds a run, and --resume never was given; give another --out")
        free = checkpoints.bookkeeping(self.training) | {*FREE, *HASHED}
        if all(str(style).endswith(".jinja") for style in (before.get("prompt_style"), now["prompt_style"])):
            free.add("prompt_style")
        if different := [key for key in now if key not in free and before.get(key) != now[key]]:
            changes = ", ".join(f"{key} was {before.get(key)!r} and is {now[key]!r}" for key in different)
            what, advice = ("a finished run", self.further) if is_finished else ("a run", "give another --out")
            raise TrainingError(f"{self.out}: holds {what} with other settings ({changes}); {advice}")
        if record.starts[0]["plain"] != is_plain():
            raise TrainingError(f"{self.out}: the run began {'without' if is_plain() else 'with'} --plain; do the same")
        what = f"{self.out}: files of the base, the adapter or the template"
        checkpoints.check_same(what, record.inputs_sha256, self.inputs)
        return Earlier(record.starts, record.data_sha256, checkpoint, damaged, is_finished)

    @property
    def further(self) -> str:
        """Return how to go on where the run is finished."""
        start = "model further, give --model" if self.is_full else "adapter further, add --adapter"
        return f"give another --out; to train its {start} {self.out}"

    def claim(self, data: Data) -> None:
        """Lock the directory of a new run; of a resumed one, check that data and length still fit."""
        world.from_first(lambda: self._claim(data))

    def _claim(self, data: Data) -> None:
        if self.earlier.starts:
            checkpoints.check_same(f"{self.out}: the data", self.earlier.data_sha256, data.files)
        if self.earlier.checkpoint:
            total = len(plan_steps(data.train.lengths, self.training))
            checkpoints.check_extension(self.earlier.checkpoint, total, self.training)
        if self.lock_file is None:
            self.lock_file = lock(self.out)
            if holds_files(self.out):
                raise TrainingError(f"{self.out}: another process has written there meanwhile; give another --out")

    def close(self) -> None:
        """Close the files that are open, so that another process may use the directory."""
        for file in (self.tracker, self.lock_file):
            if file:
                file.close()

    def read_data(self, show: Callable[[str], None] | None = None) -> Data:
        """Read the rows of all splits and encode them as the model's tokenizer and the settings say.

        `show` is called with lines on the progress.
        """
        tokenizer = tokenizer_of(self.config.model, self.adapters) or load_tokenizer(self.config.model)
        tokenizer = tokenizer.with_tokens(self.config.add_tokens).at(self.began.astimezone())
        files = find_files(self.config.data, self.config.eval_data)
        tokenizer = use_prompt_style(tokenizer, self.data_config.prompt_style, stream_rows(*files["train"]))
        encoded = encode_files(files, tokenizer, self.data_config, show)
        splits = hold_out(encoded, self.config.eval_split, self.training)
        general = load_general(self.config.general_data, tokenizer, self.data_config)
        choices = find_choices(splits["test"])
        return Data(tokenizer, **splits, choices=choices, files=hash_files(files), general=general)

    def fit_to_memory(self, data: Data, device: torch.device) -> tuple[Plan, Forecast]:
        """Resolve auto of `--gradient-checkpointing` and `--shard`, for all later calls, to what fits into memory."""
        config = self.base_config
        plan = Plan(
            replace(config, vocab_size=max(config.vocab_size, self._vocabulary(data))),
            None if self.is_full else self.adapter_config(data),
            self.training,
            self.quantization,
            resolve_dtype(self.dtype, config.source, device),
            device,
            sizes_of(data.train),
            [split.lengths for split in (data.valid, data.test, data.general)],
            world.size(),
        )
        plan, found = choose_plan(plan, "none" if self.is_full or world.size() == 1 else self.config.shard)
        self.training, self.shard = plan.training, plan.shard
        return plan, found

    def load_base(self, data: Data, device: torch.device | str) -> Llama:
        """Load the base model, quantized as it is read, with rows for new tokens."""
        load = load_model if self.shard == "none" or device == "meta" else load_sharded
        model = load(self.config.model, self.dtype, device, self.quantization)
        resize_token_embeddings(model, self._vocabulary(data))
        return model

    def attach_adapter(self, model: Llama, data: Data) -> None:
        """Attach a new adapter, or the one to start from, unless all weights are trained."""
        if self.config.adapter is not None:
            load_adapter(model, self.config.adapter, trainable=True)
        elif not self.is_full:
            attach(model, self.adapter_config(data), seed=self.training.seed)
            # decompositions may differ in a bit between devices
            world.broadcast_(checkpoints.trained_tensors(model).values())

    def adapter_config(self, data: Data) -> LoraConfig:
        """Return the adapter's config, with the rows of new tokens among those that are trained."""
        new, wanted = self._new_tokens(data), self.lora.trainable_token_indices
        if new and isinstance(wanted, Mapping):
            raise ConfigError("--add-tokens needs --trainable-token-indices to be ids, or left out")
        return replace(self.lora, trainable_token_indices=(*(wanted or ()), *new)) if new else self.lora

    def _new_tokens(self, data: Data) -> list[int]:
        return [token for text in self.config.add_tokens if (token := data.tokenizer.token_id(text)) is not None]

    def _vocabulary(self, data: Data) -> int:
        """Return the number of embedding rows that new tokens need, or those of an adapter to start from."""
        return max([-1, *self._new_tokens(data)]) + 1 if self.config.adapter is None else self.lora.vocabulary

    def set_threads(self, model: Llama, data: Data) -> int | None:
        """Set the faster number of threads (see `choose_threads`); return it, or None if it was not measured.

        A resumed run keeps the number that it began with, because another one may round differently. Of several ranks
        each keeps its own.
        """
        if world.size() > 1:
            return None
        if not self.earlier.starts:
            return choose_threads(model, data.train, self.training)
        first = self.earlier.starts[0]
        if first.get("ranks", 1) == 1 and "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(first["threads"])
        return None

    def start(self, model: Llama, data: Data, step: int) -> None:
        """Record this start in run.json, and remove what earlier ones left of steps that will be repeated."""
        weight = model.model.embed_tokens.weight
        start = {
            "time": (datetime.now(UTC).replace(microsecond=0) if self.earlier.starts else self.began).isoformat(),
            "step": step,
            "device": str(weight.device),
            "dtype": str(weight.dtype).removeprefix("torch."),
            "gradient_checkpointing": self.training.gradient_checkpointing,
            "threads": torch.get_num_threads(),
            "plain": is_plain(),
            "ranks": world.size(),
            "shard": self.shard,
        }
        for name in (MANIFEST, "summary.json"):  # of a finished run that is made longer
            remove(self.out / name)
        versions = {name: importlib.metadata.version(name) for name in PACKAGES}
        record = {
            "config": self.resolved,
            "versions": {**versions, "python": platform.python_version()},
            "data_sha256": data.files,
            "inputs_sha256": self.inputs,
            "starts": [*self.earlier.starts, start],
        }
        write_json(self.out / "run.json", record)
        data.tokenizer.save(self.out, ["chat_template.jinja"])
        prompts = Prompts("template" if data.train.conversations else "plain", self.data_config.system)
        write_text(self.out / PROMPTS_FILE, prompts.to_json())
        if self.config.report != "none":
            self.tracker = Tracker(self.config.report, self.out, self.resolved, step)
        metrics = self.out / "metrics.jsonl"
        records = read_records(metrics) if metrics.is_file() else []
        left = [without_nan(record) for record in records if record["step"] <= step]
        write_text(metrics, "".join(f"{json.dumps(record)}\n" for record in left))

    def log(self, record: Record) -> None:
        """Write a record to metrics.jsonl and to `--report`, unless `--logging-steps` leaves it out."""
        if world.is_first() and ("eval_loss" in record or record["step"] % self.training.logging_steps == 0):
            line = {key: value for key, value in record.items() if key != "total_steps"}
            append_line(self.out / "metrics.jsonl", line)
            if self.tracker:
                self.tracker(line)

    def finish(
        self,
        model: Llama,
        tokenizer: Tokenizer,
        result: TrainResult,
        before: Scores,
        after: Scores,
        drift: Drift | None,
    ) -> None:
        """Save the model or adapter, the tokenizer and the summary, which marks the run as finished, all at once."""
        summary = {
            "before": asdict(before),
            "after": asdict(after),
            "general": asdict(drift) if drift else None,
            "steps": result.steps,
            "kept_step": result.kept,
            "tokens": result.tokens,
            "seconds": result.seconds,
            "peak_memory_bytes": peak_memory_bytes(next(model.parameters()).device),
        }
        obsolete = MODEL_FILES if self.is_full else ()
        with publishing(self.out, obsolete, beside=("run.json", "metrics.jsonl")) as directory:
            if self.is_full:
                save_model(model, directory)
            else:
                save_adapter(model, directory)
            tokenizer.save(directory)
            copy_prompt_files([self.out], directory)
            write_json(directory / "summary.json", without_nan(summary))
