"""What fine-tuning a model takes in three ways, from its config.json alone: all of it, LoRA on 16 bits, QLoRA."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from minilora.adapters.attach import attach
from minilora.adapters.config import LoraConfig
from minilora.adapters.find import linear_layers
from minilora.errors import FormatError
from minilora.models.checkpoint import skeleton
from minilora.models.config import LlamaConfig
from minilora.models.llama import Llama
from minilora.quant.linear import NF4Linear, dense_weight
from minilora.runs.config import DataConfig, TrainConfig
from minilora.runs.memory import Forecast, forecast
from minilora.storage import read_json

WAYS = ("full fine-tune", "LoRA 16-bit", "QLoRA", "QLoRA, block")
KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
SHAPES = {  # of Llama 2
    "7B": (4096, 11008, 32, 32, 32),
    "13B": (5120, 13824, 40, 40, 40),
    "70B": (8192, 28672, 80, 64, 8),
}


@dataclass(frozen=True)
class MemoryFacts:
    """For each model by name, and each of the `WAYS`, a forecast; how many rows of how many tokens a batch has."""

    device: str
    rows: int
    tokens: int
    lora: LoraConfig
    models: dict[str, dict[str, Forecast]]


def memory_facts(directory: Path, device: torch.device) -> MemoryFacts:
    """Forecasts for the model of a config.json and for 7B, 13B and 70B, with the defaults of everything.

    Raises:
        FormatError: there is no config.json.
        ConfigError: a model that is not supported.
    """
    if not (directory / "config.json").is_file():
        raise FormatError(f"{directory}: holds no config.json; need the directory of a model")
    sources = {str(directory): read_json(directory / "config.json")}
    for name, sizes in SHAPES.items():
        sources[name] = {"model_type": "llama", "vocab_size": 32000, **dict(zip(KEYS, sizes, strict=True))}
    configs = {name: LlamaConfig.from_dict(source) for name, source in sources.items()}
    models = {name: {way: told(config, way, device) for way in WAYS} for name, config in configs.items()}
    return MemoryFacts(str(device), TrainConfig().batch_size, DataConfig().max_length, LoraConfig(), models)


def told(config: LlamaConfig, way: str, device: torch.device) -> Forecast:
    """The forecast of a default batch, all of it labelled."""
    training = TrainConfig(recompute="block" if way.endswith("block") else "none")
    rows = [DataConfig().max_length] * training.batch_size
    return forecast(_prepared(config, way), rows, sum(rows), training, device)


def _prepared(config: LlamaConfig, way: str) -> Llama:
    """The model without numbers, as it would be trained: in bfloat16, but for what is trained itself, in float32."""
    model = skeleton(config).to(torch.float32 if way == "full fine-tune" else torch.bfloat16)
    model.tie_weights()
    if way.startswith("QLoRA"):
        for path, linear in linear_layers(model).items():
            if path != "lm_head":
                model.set_submodule(path, NF4Linear.quantize(dense_weight(linear), linear.bias))
    if way != "full fine-tune":
        attach(model, LoraConfig())
    return model
