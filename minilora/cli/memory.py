"""Memory as a page of `inspect`, and as a few lines of a dry run."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import torch

from minilora.adapters.config import LoraConfig
from minilora.errors import FormatError
from minilora.models.config import LlamaConfig
from minilora.models.hub import fetch
from minilora.models.quantization import QuantizeConfig
from minilora.runs.config import DataConfig, TrainConfig
from minilora.runs.memory import Forecast, Plan, amount, forecast
from minilora.runs.run import pick_device
from minilora.storage import read_json

TERMS = [field.name for field in fields(Forecast)]
WAYS = ("full fine-tune", "LoRA 16-bit", "QLoRA", "QLoRA, block")
KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
SHAPES = {  # of Llama 2
    "7B": (4096, 11008, 32, 32, 32),
    "13B": (5120, 13824, 40, 40, 40),
    "70B": (8192, 28672, 80, 64, 8),
}


def memory_page(name_or_path: str) -> str:
    """Return what `inspect --memory` prints: for the model and three sizes of Llama 2, what each of the `WAYS` takes.

    Raises:
        FormatError: there is no config.json.
        ConfigError: the model is not supported.
    """
    path = Path(name_or_path)
    path, device = path if path.exists() else fetch(name_or_path, "model"), pick_device("auto")
    if not (path / "config.json").is_file():
        raise FormatError(f"{path}: holds no config.json; need the directory of a model")
    sources = {str(path): read_json(path / "config.json")}
    for name, sizes in SHAPES.items():
        sources[name] = {"model_type": "llama", "vocab_size": 32000, **dict(zip(KEYS, sizes, strict=True))}
    lora, batch = LoraConfig(), f"{TrainConfig().batch_size} rows of {DataConfig().max_length:,} tokens, all learned"
    lines = [
        f"memory to fine-tune in bfloat16 on {device}; a batch: {batch};",
        f"adapters of rank {lora.r} on {lora.target_modules}; QLoRA in nf4 with double quantization. A full fine-tune",
        "takes 16 bytes a parameter: 4 weights, 4 gradients, 8 moments, all in float32; block is --recompute block.",
        "working: logits or gradients of a moment; kept: by the C library and kernels. GB are 10^9 bytes.",
    ]
    for name, source in sources.items():
        config = LlamaConfig.from_dict(source)
        lines += ["", name, f"  {'':<15}" + "".join(f"{term:>12}" for term in (*TERMS, "peak"))]
        for way in WAYS:
            found = forecast(default_plan(config, way, device))
            sizes = (*vars(found).values(), found.peak)
            lines.append(f"  {way:<15}" + "".join(f"{amount(size):>12}" for size in sizes))
    return "\n".join(lines)


def default_plan(config: LlamaConfig, way: str, device: torch.device) -> Plan:
    """The plan of a default batch, all of it labelled."""
    is_full, training = way == "full fine-tune", TrainConfig(recompute="block" if way.endswith("block") else "none")
    rows = [(DataConfig().max_length,) * 2] * training.batch_size
    quantization = QuantizeConfig("nf4" if way.startswith("QLoRA") else "none")
    dtype = torch.float32 if is_full else torch.bfloat16
    return Plan(config, None if is_full else LoraConfig(), training, quantization, dtype, device, rows)


def memory_lines(found: Forecast, held: int, free: int | None) -> str:
    """Return what `--dry-run` prints about memory: each term of the forecast, and what is free."""
    parts = ", ".join(f"{term} {amount(getattr(found, term))}" for term in TERMS)
    free_text = "unknown" if free is None else amount(free)
    besides = f", besides {amount(held)} that the process holds already" if held else ""
    return f"memory: {parts}\n  at most {amount(found.peak)} at once{besides}; {free_text} free"
