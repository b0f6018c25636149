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
DTYPE_HELP = (
    "number format of the base model; auto: that of the checkpoint, but bfloat16 instead of float16, and float32 on a "
    "processor that computes bfloat16 slowly"
)
DEVICE_HELP = "cpu, cuda or mps; auto: CUDA, else MPS, else the CPU"
FLAG_NAMES = {"r": "lora_r"}  # fields whose flag has another name: `--r` would say too little
COUNTS = "batch_size gradient_accumulation_steps max_steps eval_steps save_total_limit logging_steps"
NEEDS: dict[str, tuple[Callable[[Any], bool], str]] = {  # fields, where they are given -> what they need
    f"{COUNTS} max_length": (lambda x: x >= 1, "a whole number of at least 1"),
    "save_steps samples": (lambda x: x >= 0, "a whole number of at least 0"),
    "warmup_steps": (lambda x: 0 <= x < 1 or 0 < x == x // 1, "a whole number, or a share of at least 0 below 1"),
    "weight_decay max_grad_norm": (lambda x: 0 <= x < math.inf, "a finite number of at least 0"),
    "learning_rate epochs": (lambda x: 0 < x < math.inf, "a finite number above 0"),
    "seed": (lambda x: 0 <= x < 2**32, "a whole number of at least 0 and below 2**32"),
    "eval_split": (lambda x: 0 <= x < 1, "a share of at least 0 and below 1"),
    "out": (bool, "a name"),  # any other empty name is refused where it is looked up
}


def flag(name: str) -> str:
    """Return the flag of a field."""
    return f"--{FLAG_NAMES.get(name, name).replace('_', '-')}"


def check_fields(config: object) -> None:
    """Raise a `ConfigError` that names each field of a config whose type is wrong, or else whose value is."""
    check_types(config)
    bad = []
    for names, (is_right, need) in NEEDS.items():
        given = {name: value for name in names.split() if (value := getattr(config, name, None)) is not None}
        bad += [f"{name} is {value!r}, need {need}" for name, value in given.items() if not is_right(value)]
    if bad:
        raise ConfigError(f"{type(config).__name__}: {'; '.join(bad)}")


@document_fields
@dataclass(frozen=True)
class DataConfig:
    """Configure how rows of data become tokens and labels.

    Raises:
        ConfigError: values of the wrong type, all of them in one message; or a value that cannot work.
    """

    max_length: int = option(
        1024,
        "maximum number of tokens in a row: a longer row loses its end, a longer `text` is divided into pieces; a "
        "lower limit takes less memory",
    )
    train_on: TrainOn = option("completion", "which tokens count in the loss: the last answer, every answer, or all")
    prompt_style: str = option(
        "auto",
        "how rows are written as text: alpaca, instruction (alpaca without its preamble), or your own .jinja file; "
        "auto: by the model's chat template, or if it has none, alpaca for instruction rows",
    )
    system: str | None = option(None, "system prompt for the rows that have none; training keeps it in the adapter")
    columns: Mapping[str, str] | None = option(
        None, "names of your columns, e.g. instruction=question,output=answer; others are left out"
    )
    allow_special: bool = option(False, "read control tokens such as <|im_end|> in rows as tokens, not as text")
    skip_bad_rows: bool = option(False, "skip rows that cannot be used and report them, instead of stopping")

    def __post_init__(self) -> None:
        check_fields(self)


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

    learning_rate: float = option(2e-4, "peak learning rate of AdamW; below 1B parameters try 3e-4, 1e-3 and 3e-3")
    lr_scheduler: Literal["cosine", "linear", "constant"] = option(
        "cosine", "how the learning rate changes after the warm-up"
    )
    warmup_steps: float = option(0.03, "steps in which the learning rate rises; below 1: a share of all steps")
    batch_size: int = option(4, "rows computed at once; fewer take less memory")
    gradient_accumulation_steps: int = option(1, "batches per update; their gradients act as those of one large batch")
    epochs: float = option(1.0, "passes over the training rows; a few hundred rows need 2 to 4")
    max_steps: int | None = option(None, "train for this many steps, whatever the number of epochs")
    gradient_checkpointing: Literal["auto", "none", "mlp", "block"] = option(
        "none", "recompute MLPs or whole blocks in the backward pass to save memory; auto: only as far as needed to fit"
    )
    weight_decay: float = option(0.0, "AdamW's weight decay, only on matrices")
    max_grad_norm: float = option(1.0, "clip the gradient norm to this; 0: no clipping")
    eval_steps: int | None = option(None, "evaluate every N steps, on validation rows or else test rows", REPORTING)
    keep: Literal["last", "best"] = option(
        "last",
        "weights of the result: the last, or those with the lowest loss in an evaluation; best needs eval_steps",
        REPORTING,
    )
    save_steps: int | None = option(
        None,
        "write a checkpoint every N steps; 0: only at the end or when stopped; by default about ten per run, and at "
        "least one every ten minutes",
        REPORTING,
    )
    save_total_limit: int = option(2, "number of checkpoints to keep", REPORTING)
    logging_steps: int = option(1, "write a line of metrics.jsonl every N steps", REPORTING)
    seed: int = option(0, "seed of the order of rows, the adapter's start values and dropout")

    def __post_init__(self) -> None:
        check_fields(self)
        if self.eval_steps is None and self.keep == "best":
            raise ConfigError("TrainConfig: keep is 'best', which needs eval_steps")


@dataclass(frozen=True)
class RunConfig:
    """Configure paths and the device of a run."""

    model: str = option(BUILTIN, "directory of the base model, or org/name[@revision] on the Hugging Face Hub")
    data: tuple[str, ...] = option(
        (BUILTIN,),
        "training rows: .jsonl, .json, .csv or .tsv files, or .txt documents; or a directory of documents, or one with "
        "train.jsonl and, if you like, valid.jsonl and test.jsonl",
    )
    eval_data: str | None = option(None, "held-out rows: a file or a directory, as for --data", "data")
    eval_split: float = option(
        0.05,
        "share of the training rows to hold out if you give no held-out rows; with --keep best, one such share for "
        "validation and one for test, unless you give them",
        "data",
    )
    out: str = option("minilora-run", "directory to write; the same command resumes the run in it")
    adapter: str | None = option(
        None,
        "adapter whose training is continued, with its rank, alpha, targets and, unless --model is given, its base: a "
        "directory, or org/name[@revision] on the Hugging Face Hub",
        "adapter",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = option("auto", DTYPE_HELP)
    device: str = option("auto", DEVICE_HELP)
    shard: Literal["none", "base"] = option("none", "base: divide the frozen base among the processes of torchrun")
    resume: Literal["auto", "never"] = option("auto", "continue the run in --out, if there is one; never: refuse to")
    general_data: str = option(
        BUILTIN,
        "text on which forgetting is measured: a file of rows with a field `text`, a .txt file, or a directory of "
        "them; none: do not measure it",
        REPORTING,
    )
    report: Literal["none", "tensorboard", "trackio", "wandb"] = option(
        "none", "also send the metrics to this package, if installed; tensorboard: to OUT/tensorboard", REPORTING
    )
    samples: int = option(20, "number of held-out rows that base and adapter answer at the end", REPORTING)

    def __post_init__(self) -> None:
        check_fields(self)


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
