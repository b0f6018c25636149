"""Settings of a run: `RunConfig`, `DataConfig`, `TrainConfig`; their fields are the command line's flags and help."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from minilora.adapters.config import LoraConfig
from minilora.errors import ConfigError, in_recipe
from minilora.files import BUILTIN
from minilora.models.bitsandbytes import QuantizeConfig
from minilora.options import check_types, document_fields, option, reject_foreign_kwargs

TrainOn = Literal["completion", "assistant", "all"]
REPORTING = "evaluating, saving and reporting"  # a group of the help page
FLAG_NAMES = {"r": "lora_r"}  # fields whose flag has another name: `--r` would say too little
COUNTS = "batch_size gradient_accumulation_steps max_steps eval_steps save_total_limit logging_steps"
NEEDS: dict[str, tuple[Callable[[Any], bool], str]] = {  # of a `TrainConfig`: fields that are given -> what they need
    COUNTS: (lambda x: x >= 1, "a whole number of at least 1"),
    "save_steps": (lambda x: x >= 0, "a whole number of at least 0"),
    "warmup_steps": (lambda x: 0 <= x < 1 or 0 < x == x // 1, "a whole number, or a share of at least 0 below 1"),
    "weight_decay max_grad_norm": (lambda x: 0 <= x < math.inf, "a finite number of at least 0"),
    "learning_rate epochs": (lambda x: 0 < x < math.inf, "a finite number above 0"),
    "seed": (lambda x: 0 <= x < 2**32, "a whole number of at least 0 and below 2**32"),
}


def flag(name: str) -> str:
    """Return the flag of a field."""
    return f"--{FLAG_NAMES.get(name, name).replace('_', '-')}"


@document_fields
@dataclass(frozen=True)
class DataConfig:
    """Configure how rows of data become tokens and labels.

    Raises:
        ConfigError: values of the wrong type, all of them in one message; or a value that cannot work.
    """

    max_length: int = option(1024, "maximum tokens of a row; longer rows are cut, those of `text` into pieces")
    train_on: TrainOn = option("completion", "labels: the last answer, every assistant turn, or all tokens")
    prompt_style: str = option(
        "auto",
        "how a conversation is written: alpaca, instruction (alpaca without its preamble), or a .jinja file; "
        "auto: the model's chat template, and for instruction rows without one, alpaca",
    )
    system: str | None = option(None, "system prompt of conversations that have none")
    columns: Mapping[str, str] | None = option(
        None, "which of your columns to use, e.g. instruction=question,output=answer"
    )
    allow_special: bool = option(False, "let control tokens such as <|im_end|> in a row's text act as such")
    skip_bad_rows: bool = option(False, "skip rows that cannot be used, and report them")

    def __post_init__(self) -> None:
        check_types(self)
        if self.max_length < 1:
            raise ConfigError(f"DataConfig: max_length is {self.max_length!r}, need a whole number of at least 1")


@reject_foreign_kwargs(
    lr="use learning_rate",
    num_train_epochs="use epochs",
    per_device_train_batch_size="use batch_size",
    output_dir="give ml.train a checkpoint_dir",
    loraplus_lr_ratio=in_recipe("loraplus"),
)
@document_fields
@dataclass(frozen=True)
class TrainConfig:
    """Configure a training run.

    Raises:
        ConfigError: values of the wrong type, or else values that cannot work; all of them in one message.
    """

    learning_rate: float = option(2e-4, "peak learning rate of AdamW")
    lr_scheduler: Literal["cosine", "linear", "constant"] = option(
        "cosine", "how the learning rate falls after the warm-up"
    )
    warmup_steps: float = option(0.03, "steps in which the learning rate rises; below 1: a fraction of all steps")
    batch_size: int = option(4, "rows per step (with accumulation, per micro-batch)")
    gradient_accumulation_steps: int = option(1, "micro-batches in a step")
    epochs: float = option(1.0, "passes over the training rows")
    max_steps: int | None = option(None, "stop after this many steps, regardless of --epochs")
    gradient_checkpointing: Literal["auto", "none", "mlp", "block"] = option(
        "none", "recompute MLPs or whole blocks in the backward pass to save memory; auto: only as far as needed to fit"
    )
    weight_decay: float = option(0.0, "AdamW's weight decay, on matrices only")
    max_grad_norm: float = option(1.0, "clip the gradient norm to this; 0: no clipping")
    eval_steps: int | None = option(None, "evaluate every N steps, on validation or else held-out rows", REPORTING)
    keep: Literal["last", "best"] = option(
        "last", "which weights are the result: the last, or the best of the evaluations", REPORTING
    )
    save_steps: int | None = option(
        None,
        "write a checkpoint every N steps; 0: only at the end or when stopped; by default about ten times a run, and "
        "at least every ten minutes",
        REPORTING,
    )
    save_total_limit: int = option(2, "checkpoints to keep", REPORTING)
    logging_steps: int = option(1, "steps between two lines of metrics.jsonl", REPORTING)
    seed: int = option(0, "seed of the order of rows, the adapter's start values and dropout")

    def __post_init__(self) -> None:
        check_types(self)
        bad = []
        for names, (is_right, need) in NEEDS.items():
            given = {name: value for name in names.split() if (value := getattr(self, name)) is not None}
            bad += [f"{name} is {value!r}, need {need}" for name, value in given.items() if not is_right(value)]
        if self.eval_steps is None and self.keep == "best":
            bad.append("keep best needs eval_steps")
        if bad:
            raise ConfigError("TrainConfig: " + "; ".join(bad))


@dataclass(frozen=True)
class RunConfig:
    """Configure paths and the device of a run."""

    model: str = option(BUILTIN, "directory of the base model, or org/name[@revision] on the Hugging Face Hub")
    data: tuple[str, ...] = option(
        (BUILTIN,),
        "rows: .jsonl, .json, .csv or .tsv files, or .txt documents; a directory of documents, or with train.jsonl and "
        "perhaps valid.jsonl and test.jsonl",
    )
    eval_data: str | None = option(None, "held-out rows: a file or a directory, as for --data", "data")
    eval_split: float = option(
        0.05,
        "share of the training rows to hold out where --data and --eval-data give none; with --keep best also where "
        "they give only one of validation and test rows",
        "data",
    )
    out: str = option("minilora-run", "directory of the run")
    adapter: str | None = option(
        None,
        "adapter to continue training: a directory or hub id; gives rank, alpha, targets and, by default, the model",
        "adapter",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "number format of the base model; auto: the checkpoint's, where it is fast"
    )
    device: str = option("auto", "cpu, cuda or mps; auto: the best available")
    shard: Literal["none", "base"] = option("none", "base: divide the frozen base among the processes of a run")
    resume: Literal["auto", "never"] = option("auto", "continue the run in --out; never: refuse if there is one")
    general_data: str = option(
        BUILTIN,
        "general text on which the adapter's side effects are measured: data with a field `text`; none: skip this",
        REPORTING,
    )
    report: Literal["none", "tensorboard", "trackio", "wandb"] = option(
        "none", "also send the metrics to a library that you have installed; tensorboard: to OUT/tensorboard", REPORTING
    )
    samples: int = option(20, "held-out rows for base and adapter to answer at the end", REPORTING)

    def __post_init__(self) -> None:
        check_types(self)
        if not self.out:  # any other empty name is refused where it is looked up
            raise ConfigError("RunConfig: out is empty; leave it out, or name something")
        if not 0 <= self.eval_split < 1:
            raise ConfigError(f"RunConfig: eval_split is {self.eval_split!r}, need a share of at least 0 and below 1")
        if self.samples < 0:
            raise ConfigError(f"RunConfig: samples is {self.samples!r}, need a whole number of at least 0")


@dataclass(frozen=True)
class Settings:
    """All settings of a run, as they are asked for."""

    run: RunConfig = RunConfig()
    quantization: QuantizeConfig = QuantizeConfig()
    lora: LoraConfig = LoraConfig()
    data: DataConfig = DataConfig()
    training: TrainConfig = TrainConfig()

    @property
    def by_flag(self) -> dict[str, Any]:
        """The settings by the names of their flags, as run.json has them."""
        values: dict[str, Any] = {}
        for config in (self.run, self.quantization, self.lora, self.data, self.training):
            values |= asdict(config)
        del values["task_type"]  # no flag: a run trains language models
        return json.loads(json.dumps({FLAG_NAMES.get(name, name): value for name, value in values.items()}))
