"""What a run is told: where things are, and all settings by the names of their flags."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

from minilora.adapters.config import RENAMED, LoraConfig
from minilora.errors import ConfigError, check_types
from minilora.models.quantization import QuantizeConfig
from minilora.runs.config import WATCHING, DataConfig, TrainConfig, option
from minilora.storage import BUILTIN

Resume = Literal["auto", "never"]
Report = Literal["none", "tensorboard"]
Dtype = Literal["auto", "float32", "bfloat16"]
Method = Literal["lora", "full"]


@dataclass(frozen=True)
class RunConfig:
    """Where things are, and on what to compute."""

    model: str = option(BUILTIN, "directory of the base model, or org/name[@revision] of the Hugging Face hub")
    data: tuple[str, ...] = option(
        (BUILTIN,),
        "rows: .jsonl or .json files, also .gz; a directory with train.jsonl and perhaps valid.jsonl and test.jsonl; "
        "or a hub id",
    )
    out: str = option("minilora-run", "directory of the run")
    method: Method = option("lora", "train an adapter; or all weights of the model, in float32", "adapter")
    dtype: Dtype = option("auto", "number format of the base model; auto: the checkpoint's, where it is fast")
    device: str = option("auto", "cpu, cuda, mps; auto: the best there is")
    resume: Resume = option("auto", "go on with the run in --out, or refuse if there is one")
    general_data: str = option(
        BUILTIN,
        "general text, to see what the adapter costs on it: data with a field `text`; none: do not look",
        WATCHING,
    )
    add_tokens: tuple[str, ...] = option(
        (), "new tokens of the tokenizer; their embeddings are trained with the adapter", "data"
    )
    report: Report = option("none", "also write what a run tells for tensorboard, in OUT/tensorboard", WATCHING)
    samples: int = option(2, "held-out prompts that each evaluation answers, to be looked at", WATCHING)

    def __post_init__(self) -> None:
        check_types(RunConfig, vars(self))
        if self.samples < 0:
            raise ConfigError(f"RunConfig: samples is {self.samples!r}, need a whole number of at least 0")


def resolve(
    run: RunConfig, quantization: QuantizeConfig, lora: LoraConfig, reading: DataConfig, training: TrainConfig
) -> dict[str, Any]:
    """All fields, by the names of their flags."""
    values = {**asdict(run), **asdict(quantization), **asdict(lora), **asdict(reading), **asdict(training)}
    return {RENAMED.get(name, name): value for name, value in values.items()}


def default_settings() -> dict[str, Any]:
    """What `resolve` makes of all defaults, as run.json has it."""
    defaults = resolve(RunConfig(), QuantizeConfig(), LoraConfig(), DataConfig(), TrainConfig())
    return json.loads(json.dumps(defaults))
