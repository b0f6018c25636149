"""minilora inspect: tell what a model, an adapter, a run or a safetensors file holds."""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from minilora.cli.command import Command, Options
from minilora.inspect.adapter import AdapterFacts, ModuleFacts
from minilora.inspect.fold import fold
from minilora.inspect.look import look
from minilora.inspect.model import SIZES, ModelFacts
from minilora.inspect.readers import Reader
from minilora.inspect.run import CheckpointFacts, RunFacts
from minilora.inspect.tensors import FileFacts

WIDTH, LABEL = 80, 16  # with which a SHA-256 fits on a line
SHOWN = 3  # reasons of a reader; the others are counted
LEGEND = (
    "n modules of a kind; delta: the norm of s B A, from the least to the greatest of them; delta/base: over the norm "
    "of the base's weight; spread: the effective rank, how many equally strong directions the delta amounts to"
)
UNKNOWN = "?"
Row = tuple[str, ...]


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="a directory of a model, an adapter or a run; a .safetensors file")
    parser.add_argument("--model", help="base model of an adapter (default: the one that it names, where that is here)")
    parser.add_argument("--json", action="store_true", help="print one JSON object with each tensor and module")


def _run(options: Options) -> int:
    facts = look(options["path"], options["model"])
    if options["json"]:
        found = {name: value for name, value in vars(facts).items() if value is not None}
        print(json.dumps(found, default=vars))
        return 0
    pages = [
        _run_page(facts.run) if facts.run else [],
        _checkpoint_page(facts.checkpoint) if facts.checkpoint else [],
        _adapter_page(facts.adapter) if facts.adapter else [],
        _model_page(facts.model) if facts.model else [],
        _file_page(facts.file) if facts.file else [],
    ]
    print("\n\n".join("\n".join(map(_printable, page)) for page in pages if page))
    return 0


def _file_page(facts: FileFacts) -> list[str]:
    tensors = {tensor.name: tensor for tensor in facts.tensors}
    rows = []
    for names in fold({tensor.name: (tensor.dtype, tensor.shape) for tensor in facts.tensors}):
        folded = [tensors[name] for name in names.names()]
        first, total = folded[0], sum(tensor.bytes for tensor in folded)
        rows.append((str(len(folded)), first.dtype, _shape(first.shape), f"{total:,}", str(names)))
    return [
        f"safetensors file  {facts.path}",
        *_item("bytes", f"{facts.bytes:,}, of which {facts.header_bytes:,} are the header"),
        *_item("metadata", _pairs(facts.metadata) or "none"),
        *_item("tensors", f"{len(tensors):,}, {sum(tensor.count for tensor in facts.tensors):,} numbers"),
        *_item("read by", "every reader of safetensors" + ("" if "format" in facts.metadata else "; not transformers")),
        "",
        *_table(("count", "dtype", "shape", "bytes", "name"), rows),
    ]


def _model_page(facts: ModelFacts) -> list[str]:
    windows = "".join(f"; {count} layers look back {window:,}" for window, count in facts.windows.items())
    context = facts.sizes.get("max_position_embeddings")
    shown = [name for name in SIZES if name in facts.sizes and name != "max_position_embeddings"]
    tokenizer = facts.tokenizer
    lines = [
        f"model  {facts.path}",
        *_item("architecture", f"{', '.join(facts.architectures) or UNKNOWN} (model_type {facts.model_type})"),
        *_item("sizes", ", ".join(f"{SIZES[name]} {facts.sizes[name]:,}" for name in shown)),
        *_item(
            "context",
            f"{UNKNOWN if context is None else f'{context:,}'}{windows}; rope: {_pairs(facts.rope) or UNKNOWN}",
        ),
        *_item("head", UNKNOWN if facts.tied is None else "tied to the embedding" if facts.tied else "its own weight"),
        *_item("quantized", facts.quantized or "no"),
        *_item("numbers" if facts.quantized else "parameters", f"{facts.parameters:,}"),
    ]
    shares = [(f"{count:,}", f"{count / max(1, facts.parameters):.1%}", part) for part, count in facts.parts.items()]
    lines += [" " * (LABEL - 2) + line for line in _table((), shares)]
    lines += _item("dtypes", _counts(facts.dtypes))
    lines += _item("files", ", ".join(f"{name} ({size:,} bytes)" for name, size in facts.files.items()))
    if tokenizer is None:
        lines += _item("tokenizer", f"not read: {facts.tokenizer_problem}")
    else:
        lines += _item("tokenizer", f"{tokenizer.vocabulary:,} tokens; {_pairs(tokenizer.special_tokens)}")
        lines += _item("chat template", "yes" if tokenizer.has_chat_template else "no")
    return [*lines, *_readers(facts.readers)]


def _adapter_page(facts: AdapterFacts) -> list[str]:
    config = facts.config
    others = [str(names) for names in fold(dict.fromkeys(facts.other_tensors))]
    version = f"; layout of PEFT {config['peft_version']}" if config.get("peft_version") else ""
    kind = f"{config.get('peft_type', UNKNOWN)}; init_lora_weights {config.get('init_lora_weights', UNKNOWN)}{version}"
    places = f"{len(facts.modules):,} modules" + (f" and {len(facts.other_tensors):,} other tensors" if others else "")
    return [
        f"adapter  {facts.path}",
        *_item("base model", _base(facts)),
        *_item("kind", kind),
        *_item("rank", ", ".join(map(str, sorted({module.rank for module in facts.modules}))) or UNKNOWN),
        *_item("alpha", f"{config.get('lora_alpha', UNKNOWN)}{' (rsLoRA)' if config.get('use_rslora') else ''}"),
        *_item("scale", ", ".join(dict.fromkeys(_scale(module) for module in facts.modules)) or UNKNOWN),
        *_item("dropout", str(config.get("lora_dropout", UNKNOWN))),
        *_item("parameters", f"{facts.parameters:,} in {places}; {_counts(facts.dtypes)}"),
        *_item("file", f"{facts.bytes:,} bytes"),
        *(_item("other tensors", ", ".join(others)) if others else []),
        *_readers(facts.readers),
        "",
        *_module_table(facts.modules, facts.base is not None),
        *textwrap.wrap(LEGEND, WIDTH, initial_indent="  ", subsequent_indent="  "),
    ]


def _base(facts: AdapterFacts) -> str:
    named = str(facts.config.get("base_model_name_or_path") or UNKNOWN)
    if facts.base is None:
        return f"{named}; it is not here: see --model"
    return named if named == facts.base else f"{named}; measured against {facts.base}"


def _scale(module: ModuleFacts) -> str:
    return UNKNOWN if module.scale is None else f"{module.scale:.4g}"


def _module_table(modules: Sequence[ModuleFacts], has_base: bool) -> list[str]:
    known = {module.module: module for module in modules}
    rows = []
    for names in fold({module.module: (module.rank, module.scale, module.shape) for module in modules}):
        folded = [known[name] for name in names.names()]
        norms = [module.relative_norm if has_base else module.delta_norm for module in folded]
        spread = _range([module.effective_rank for module in folded])
        rows.append((str(len(folded)), str(folded[0].rank), _scale(folded[0]), _range(norms), spread, str(names)))
    return _table(("n", "rank", "scale", "delta/base" if has_base else "delta", "spread", "module"), rows)


def _run_page(facts: RunFacts) -> list[str]:
    lines = [f"run  {facts.path}", *_item("settings", _pairs(facts.settings) or "the defaults")]
    lines += [line for name, digest in facts.data_sha256.items() for line in _item("data", f"{name} sha256 {digest}")]
    lines += [line for start in facts.starts for line in _item("start", _pairs(start))]
    lines += _item("versions", _pairs(facts.versions))
    if facts.last_step is not None:
        lines += _item("last step", _pairs(facts.last_step))
    if facts.last_evaluation is not None:
        lines += _item("evaluation", _pairs(facts.last_evaluation))
    lines += _item("checkpoints", ", ".join(facts.checkpoints) or "none")
    if facts.summary is None:
        goes_on = facts.checkpoints[-1] if facts.checkpoints else "the beginning"
        return [*lines, *_item("finished", f"no; it goes on from {goes_on}")]
    summary = dict(facts.summary)
    lines += [line for when in ("before", "after") for line in _item(when, _pairs(summary.pop(when, {})))]
    return [*lines, *_item("finished", _pairs(summary))]


def _checkpoint_page(facts: CheckpointFacts) -> list[str]:
    return [f"checkpoint  {facts.path}", *_item("state", _pairs(facts.state))]


def _readers(readers: Iterable[Reader]) -> list[str]:
    """Who reads it; below, on what condition, or the first reasons why not."""
    lines: list[str] = []
    for reader in readers:
        lines += _item("" if lines else "read by", f"{reader.tool}: {'yes' if reader.reads else 'no'}")
        lines += [line for reason in reader.reasons[:SHOWN] for line in _item("", f"- {reason}")]
        if len(reader.reasons) > SHOWN:
            lines += _item("", f"- and {len(reader.reasons) - SHOWN} more: see --json")
    return lines


def _item(label: str, text: str) -> list[str]:
    """A label and its text, which goes on below itself."""
    lines = textwrap.wrap(text, WIDTH - LABEL, break_long_words=False, break_on_hyphens=False) or [""]
    return [f"{'' if i else '  ' + label:<{LABEL}}{line}" for i, line in enumerate(lines)]


def _table(head: Row, rows: Sequence[Row]) -> list[str]:
    """Columns to the right but the last, which may be long."""
    everything = [head, *rows] if head else list(rows)
    widths = [max(len(row[i]) for row in everything) for i in range(len(everything[0]) - 1)] if everything else []
    return [
        "  " + "  ".join([*(cell.rjust(width) for cell, width in zip(row, widths, strict=False)), row[-1]])
        for row in everything
    ]


def _pairs(values: Any) -> str:
    """key value, key value; lists that are long or nested by their length."""
    if not isinstance(values, Mapping):
        return str(values)
    return ", ".join(f"{key} {_value(value)}" for key, value in values.items())


def _value(value: Any) -> str:
    if isinstance(value, list) and (len(value) > 8 or any(isinstance(entry, Mapping) for entry in value)):
        return f"({len(value)} values)"
    if isinstance(value, Mapping):
        return f"({', '.join(f'{key} {_number(inner)}' for key, inner in value.items())})"
    return _number(value)


def _number(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _counts(dtypes: Mapping[str, int]) -> str:
    return (
        next(iter(dtypes)) if len(dtypes) == 1 else ", ".join(f"{dtype} {count:,}" for dtype, count in dtypes.items())
    )


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


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


COMMAND = Command(
    name="inspect",
    help="tell what a model, an adapter, a run or a safetensors file holds",
    about="Tell what a model, an adapter, a run or a safetensors file holds, and which tools read it.",
    example="minilora inspect run",
    add_flags=_add_flags,
    run=_run,
)
