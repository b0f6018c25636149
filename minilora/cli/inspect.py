"""Show what a model, an adapter, a run or a safetensors file holds.

Of an adapter, it also says which tools read it.

Example:
  minilora inspect run
"""

from __future__ import annotations

import argparse
import json
import math
import re
import textwrap
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from minilora.adapters.config import LoraConfig
from minilora.adapters.layout import PREFIX
from minilora.cli import Options
from minilora.errors import FormatError
from minilora.models.bitsandbytes import QuantizeConfig
from minilora.models.config import LlamaConfig
from minilora.models.hub import fetch
from minilora.runs.config import DataConfig, TrainConfig
from minilora.runs.memory import Forecast, Plan, amount, forecast
from minilora.runs.run import pick_device
from minilora.storage import TensorEntry, read_json
from minilora.tools.inspect import inspect_path

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
        lines += ["", name, f"  {'':<15}" + "".join(f"{term:>12}" for term in (*Forecast.__dataclass_fields__, "peak"))]
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


WIDTH, LABEL = 80, 14  # with which a SHA-256 fits on a line
CONFIG_KEYS = (
    *("architectures", "model_type", "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings", "rope_theta", "rope_scaling"),
    *("rope_parameters", "tie_word_embeddings", "quantization_config"),
    *("base_model_name_or_path", "peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "lora_dropout", "bias"),
    *("init_lora_weights", "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters"),
)
LEGEND = (
    "n modules of a kind; effective: the effective rank, how many equally strong directions B A amounts to, from the "
    "least to the greatest of them; delta: the norm of the change, s B A but for DoRA; delta/base: over the norm of "
    "the base's weight; change/base: the norm of the difference over that of the base's tensor"
)
PLAIN = (
    "Readers that know only A, B and lora_alpha / r ignore or refuse these (docs/readers.md). minilora export writes "
    "what A and B can express, minilora merge the whole model."
)
UNKNOWN = "?"
NUMBER = re.compile(r"(?<![^./])([0-9]{1,9})(?![^./])")  # a whole part of a name


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="a directory of a model, an adapter or a run; a .safetensors file")
    parser.add_argument("--model", help="base model of an adapter (default: the one that it names, where that is here)")
    parser.add_argument(
        "--memory",
        action="store_true",
        help="tell what fine-tuning a model takes, from its config.json alone, and what 7B, 13B and 70B do",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object with each tensor and module")


def run(options: Options) -> int:
    if options["memory"]:
        print(memory_page(options["path"]))
        return 0
    found = inspect_path(options["path"], options["model"])
    if options["json"]:
        print(json.dumps(found, default=vars))
    else:
        print("\n\n".join("\n".join(map(_printable, _page(kind, facts))) for kind, facts in found.items()))
    return 0


def _page(kind: str, facts: Mapping[str, Any]) -> list[str]:
    lines = [f"{kind}  {facts['path']}"]
    for key, text in _texts(kind, facts).items():
        label = f"  {key.replace('_', ' ')}"
        for paragraph in text.split("\n"):
            for line in textwrap.wrap(paragraph, WIDTH - LABEL, break_long_words=False, break_on_hyphens=False) or [""]:
                lines.append(f"{label:<{LABEL}}{line}")
                label = ""
    if kind == "adapter":
        has_base = facts["base"] is not None
        norm = {"delta/base": "relative_norm"} if has_base else {"delta": "delta_norm"}
        columns = {"rank": "rank", "effective": "effective_rank", "scale": "scale", **norm}
        modules = {module["module"]: module for module in facts["modules"]}
        lines += _table("n", modules, columns, "module", ("rank", "scale", "shape"))
        others = {name.removeprefix(PREFIX): other for name, other in facts["other_tensors"].items()}
        columns = {"shape": "shape", **({"change/base": "relative_change"} if has_base else {})}
        lines += _table("n", others, columns, "beside A and B", ("shape",)) if others else []
        lines += ["", *textwrap.wrap(LEGEND, WIDTH, initial_indent="  ", subsequent_indent="  ")]
    elif kind != "run":
        tensors = {name: vars(entry) for name, entry in facts["tensors"].items()}
        columns = {key: key for key in ("dtype", "shape", "bytes")}
        lines += _table("count", tensors, columns, "name", ("dtype", "shape"))
    return lines


def _texts(kind: str, facts: Mapping[str, Any]) -> dict[str, str]:
    """Describe what is not a table, by its label."""
    shown = {key: value for key, value in facts.items() if key not in ("path", "modules", "other_tensors")}
    if kind == "run":
        shown.pop("config", None)  # of which the settings are shown
        if facts["summary"] is None:
            shown["summary"] = f"none yet; the run goes on from {facts['checkpoint'] or 'the beginning'}"
        return {key: _text(value) or "none" for key, value in shown.items()}
    texts = {key: _text(value) or "none" for key, value in shown.items()}
    if "config" in shown:
        config = shown["config"]
        texts["config"] = _text({key: config[key] for key in CONFIG_KEYS if config.get(key) is not None})
    if kind == "file":
        texts["bytes"] = f"{facts['bytes']:,}"
    elif kind == "model":
        texts["files"] = ", ".join(f"{name} ({size:,} bytes)" for name, size in facts["files"].items())
    elif kind == "adapter":
        texts["base"] = facts["base"] or "not here: see --model"
        if facts["step"] is None:  # as it is no checkpoint
            del texts["step"]
    if facts.get("features"):
        texts["features"] = "\n".join([PLAIN, *(f"- {name}: {why}" for name, why in facts["features"].items())])
    if facts.get("problems"):
        texts["problems"] = "\n".join(["minilora does not load it", *(f"- {each}" for each in facts["problems"])])
    return {**texts, "tensors": _numbers(facts["tensors"])}


def _table(
    count: str, facts: Mapping[str, Mapping[str, Any]], columns: Mapping[str, str], name: str, same: Sequence[str]
) -> list[str]:
    """One row for names that differ in numbers alone and whose facts are equal in the keys `same`.

    `columns` maps titles to keys; `count` and `name` are the titles of the first column and of the last.
    """
    rows = [[count, *columns, name]]
    for label, names in fold({name: tuple(each[key] for key in same) for name, each in facts.items()}):
        cells = (_cell(key, [facts[name][key] for name in names]) for key in columns.values())
        rows.append([str(len(names)), *cells, label])
    widths = [*[max(map(len, column)) for column in zip(*rows, strict=True)][:-1], 0]
    return ["", *("".join(f"  {cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)]


def _cell(key: str, values: Sequence[Any]) -> str:
    """The sum of bytes; else what is equal, or the least and the greatest value if all are known."""
    if key == "bytes":
        return f"{sum(values):,}"
    if key == "shape":
        return "x".join(map(str, values[0])) or "scalar"
    if None in values:
        return UNKNOWN
    digits = 4 if key == "scale" else 2
    low, high = (f"{end:.{digits}g}" if isinstance(end, float) else str(end) for end in (min(values), max(values)))
    return low if low == high else f"{low}..{high}"


def fold(kinds: Mapping[str, Hashable]) -> list[tuple[str, list[str]]]:
    """Group names of one kind that differ in numbers alone, as (label, names).

    A label has the least and the greatest number of each place. It covers names that do not exist if some between them
    are of another kind, or missing; the count of the names shows it.

    >>> fold({"a.0.w": "x", "a.1.w": "x", "a.2.w": "y", "b": "x"})
    [('a.{0-1}.w', ['a.0.w', 'a.1.w']), ('a.2.w', ['a.2.w']), ('b', ['b'])]
    """
    groups: dict[Hashable, list[str]] = {}
    for name in sorted(kinds):
        groups.setdefault((*NUMBER.split(name)[::2], kinds[name]), []).append(name)
    return [(_label(names), names) for names in groups.values()]


def _label(names: list[str]) -> str:
    places = [set(place) for place in zip(*map(NUMBER.split, names), strict=True)]
    ends = [sorted(place, key=int) if len(place) > 1 else [*place] for place in places]
    return "".join(f"{{{end[0]}-{end[-1]}}}" if len(end) > 1 else end[0] for end in ends)


def _numbers(tensors: Mapping[str, TensorEntry]) -> str:
    """How many numbers there are, and of which dtypes."""
    counts: Counter[str] = Counter()
    for tensor in tensors.values():
        counts[tensor.dtype] += math.prod(tensor.shape)
    dtypes = ", ".join(f"{dtype} {count:,}" if len(counts) > 1 else dtype for dtype, count in counts.most_common())
    size = sum(tensor.bytes for tensor in tensors.values())
    return f"{counts.total():,} numbers, {size:,} bytes in {len(tensors):,} tensors; {dtypes}"


def _text(value: Any, depth: int = 0) -> str:
    """key value, key value; inner lists that are long or nested, and what lies still deeper, by their length."""
    is_nested = isinstance(value, list) and (len(value) > 8 or any(isinstance(inner, Mapping) for inner in value))
    if (is_nested and depth) or (isinstance(value, Mapping | list) and depth > 2):
        return f"({len(value)} values)"
    if isinstance(value, Mapping):
        text = ", ".join(f"{key} {_text(inner, depth + 1)}" for key, inner in value.items())
        return f"({text})" if depth else text
    if isinstance(value, list):
        return ", ".join(_text(inner, depth + 1) for inner in value)
    return UNKNOWN if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _printable(text: str) -> str:
    """Names in a file may hold anything: what a terminal could take for an order is spelled out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
