"""minilora inspect: tell what a model, an adapter, a run or a safetensors file holds."""

from __future__ import annotations

import json
import math
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from minilora.adapters.layout import PREFIX
from minilora.cli.command import Options
from minilora.cli.memory import memory_page
from minilora.storage import TensorEntry
from minilora.tools.inspect import FileFacts, look
from minilora.tools.inspect_adapter import AdapterFacts, ModuleFacts, OtherFacts
from minilora.tools.inspect_fold import fold
from minilora.tools.inspect_model import ModelFacts

WIDTH, LABEL = 80, 14  # with which a SHA-256 fits on a line
SHOWN = 3  # reasons why a tool does not read something; the others are counted
MODEL_KEYS = (
    *("architectures", "model_type", "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings", "rope_theta", "rope_scaling"),
    *("rope_parameters", "tie_word_embeddings", "quantization_config"),
)
ADAPTER_KEYS = (
    *(
        "peft_type",
        "r",
        "lora_alpha",
        "use_rslora",
        "use_dora",
        "lora_dropout",
        "init_lora_weights",
        "bias",
        "lora_bias",
    ),
    *("modules_to_save", "trainable_token_indices", "target_parameters"),
)
LEGEND = (
    "n modules of a kind; effective: the effective rank, how many equally strong directions B A amounts to, from the "
    "least to the greatest of them; delta: the norm of the change, s B A but for DoRA; delta/base: over the norm of "
    "the base's weight"
)
UNKNOWN = "?"
Row = tuple[str, ...]


def run(options: Options) -> int:
    if options["memory"]:
        print(memory_page(options["path"]))
        return 0
    facts = look(options["path"], options["model"])
    if options["json"]:
        found = {name: value for name, value in vars(facts).items() if value is not None}
        print(json.dumps(found, default=vars))
        return 0
    pages = [
        _run_page(facts.run) if facts.run else [],
        _adapter_page(facts.adapter) if facts.adapter else [],
        _model_page(facts.model) if facts.model else [],
        _file_page(facts.file) if facts.file else [],
    ]
    print("\n\n".join("\n".join(map(_printable, page)) for page in pages if page))
    return 0


def _file_page(facts: FileFacts) -> list[str]:
    inside = sum(tensor.bytes for tensor in facts.tensors.values())
    return [
        f"safetensors file  {facts.path}",
        *_item("bytes", f"{facts.bytes:,}, of which {inside:,} are the tensors"),
        *_item("metadata", _text(facts.metadata) or "none"),
        *_item("numbers", _numbers(facts.tensors)),
        "",
        *_tensor_table(facts.tensors),
    ]


def _model_page(facts: ModelFacts) -> list[str]:
    return [
        f"model  {facts.path}",
        *_item("config", _text({key: facts.config[key] for key in MODEL_KEYS if facts.config.get(key) is not None})),
        *_item("numbers", _numbers(facts.tensors)),
        *_item("files", ", ".join(f"{name} ({size:,} bytes)" for name, size in facts.files.items())),
        *_item("tokenizer", _text(facts.tokenizer)),
        *_readers(facts.problems),
        "",
        *_tensor_table(facts.tensors),
    ]


def _adapter_page(facts: AdapterFacts) -> list[str]:
    base = _text(facts.config.get("base_model_name_or_path"))
    found = "it is not here: see --model" if facts.base is None else f"measured against {facts.base}"
    return [
        f"adapter  {facts.path}",
        *(_item("checkpoint", f"of step {_text(facts.step)}") if facts.step is not None else []),
        *_item("base model", base if facts.base == base else f"{base}; {found}"),
        *_item("config", _text({key: facts.config[key] for key in ADAPTER_KEYS if facts.config.get(key) is not None})),
        *_item("numbers", _numbers(facts.tensors)),
        *_readers(facts.problems),
        "",
        *_module_table(facts.modules, facts.base is not None),
        *textwrap.wrap(LEGEND, WIDTH, initial_indent="  ", subsequent_indent="  "),
        *(["", *_other_table(facts.other_tensors, facts.base is not None)] if facts.other_tensors else []),
    ]


def _run_page(facts: Mapping[str, Any]) -> list[str]:
    lines = [f"run  {facts['path']}"]
    for key in (key for key in facts if key not in ("path", "config", "summary")):
        lines += _item(key.replace("_", " "), _text(facts[key]) or "none")
    goes_on = f"no; it goes on from {facts['checkpoint'] or 'the beginning'}"
    return [*lines, *_item("finished", goes_on if facts["summary"] is None else _text(facts["summary"]))]


def _tensor_table(tensors: Mapping[str, TensorEntry]) -> list[str]:
    rows = []
    for label, names in fold({name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}):
        dtype, shape = tensors[names[0]].dtype, "x".join(map(str, tensors[names[0]].shape)) or "scalar"
        rows.append((str(len(names)), dtype, shape, f"{sum(tensors[name].bytes for name in names):,}", label))
    return _table(("count", "dtype", "shape", "bytes", "name"), rows)


def _module_table(modules: Sequence[ModuleFacts], has_base: bool) -> list[str]:
    known = {module.module: module for module in modules}
    rows = []
    for label, names in fold({module.module: (module.rank, module.scale, module.shape) for module in modules}):
        folded = [known[name] for name in names]
        rank, scale = str(folded[0].rank), UNKNOWN if folded[0].scale is None else f"{folded[0].scale:.4g}"
        norms = _range([module.relative_norm if has_base else module.delta_norm for module in folded])
        rows.append((str(len(folded)), rank, _range([m.effective_rank for m in folded]), scale, norms, label))
    return _table(("n", "rank", "effective", "scale", "delta/base" if has_base else "delta", "module"), rows)


def _other_table(others: Mapping[str, OtherFacts], has_base: bool) -> list[str]:
    """What an adapter holds besides A and B; `change/base` is how far from the base's own numbers it is."""
    rows = []
    for label, names in fold({name: other.shape for name, other in others.items()}):
        changes = [_range([others[name].relative_change for name in names])] if has_base else []
        shape = "x".join(map(str, others[names[0]].shape)) or "scalar"
        rows.append((str(len(names)), shape, *changes, label.removeprefix(PREFIX)))
    return _table(("n", "shape", *(["change/base"] if has_base else []), "beside A and B"), rows)


def _readers(problems: Mapping[str, Sequence[str]]) -> list[str]:
    """Who reads it, or the first reasons why not."""
    lines: list[str] = []
    for tool, reasons in problems.items():
        lines += _item("" if lines else "read by", f"{tool}: {'no' if reasons else 'yes'}")
        lines += [line for reason in reasons[:SHOWN] for line in _item("", f"- {reason}")]
        if len(reasons) > SHOWN:
            lines += _item("", f"- and {len(reasons) - SHOWN} more: see --json")
    return lines


def _numbers(tensors: Mapping[str, TensorEntry]) -> str:
    """How many there are, and of which dtypes."""
    counts: Counter[str] = Counter()
    for tensor in tensors.values():
        counts[tensor.dtype] += math.prod(tensor.shape)
    dtypes = ", ".join(f"{dtype} {count:,}" if len(counts) > 1 else dtype for dtype, count in counts.most_common())
    return f"{counts.total():,} in {len(tensors):,} tensors; {dtypes}"


def _item(label: str, text: str) -> list[str]:
    """A label and its text, which goes on below itself."""
    lines = textwrap.wrap(text, WIDTH - LABEL, break_long_words=False, break_on_hyphens=False) or [""]
    return [f"{'' if i else '  ' + label:<{LABEL}}{line}" for i, line in enumerate(lines)]


def _table(head: Row, rows: Sequence[Row]) -> list[str]:
    """Columns to the right but the last, which may be long."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    widths[-1] = 0
    return ["".join(f"  {cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in (head, *rows)]


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


def _range(values: Sequence[float | None]) -> str:
    """The least and the greatest, where all are known."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return UNKNOWN
    low, high = f"{min(known):.2g}", f"{max(known):.2g}"
    return low if low == high else f"{low}..{high}"


def _printable(text: str) -> str:
    """Names in a file may hold anything: what a terminal could take for an order is spelled out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
