"""Show what a model, an adapter, a run or a safetensors file contains.

The files of a directory and of its checkpoints are compared with their sizes
and SHA-256 in the manifest; the exit status is 1 if one has changed since it
was written.

In the table of an adapter's modules, norm is the Frobenius norm of s·B A.
Modules or tensors whose names differ only in numbers share a row; n is their
number.

With --base, it shows how other programs would read an adapter of this model:
how many tensors attach, with which scale, and what is lost. The exit status is
1 if the adapter does not act as trained in one of them, or in that of --for.
Verdicts that were not tried in the program are marked as untried.

Example:
  minilora inspect run --base path/to/model --for vllm
"""

import argparse
import json
import math
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

from minilora.adapters.layout import PEFT_DEFAULTS, parse_tensor_name
from minilora.cli import Options, say
from minilora.cli.dry_run import memory_page
from minilora.cli.messages import base_notes
from minilora.errors import ConfigError, listed, printable
from minilora.files import TensorEntry
from minilora.models.config import text_path
from minilora.models.hub import locate
from minilora.tools.inspect import adapter_facts, inspect_path, weight_norms
from minilora.tools.readers import EMBEDDING, HEAD, IGNORES, READERS, READS, REFUSES, RIGHT, RULINGS, Base, reader_facts

NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a whole part of a name
LAYER = re.compile(r".*?\.\d+(?=\.)")  # the first part of a path that ends in a number
LIST_WIDTH = 100  # characters of a list that are shown


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="a directory of a model, an adapter or a run; a .safetensors file")
    parser.add_argument("--json", action="store_true", help="print one JSON object with each tensor and module")
    parser.add_argument("--memory", action="store_true", help="forecast the memory that fine-tuning the model takes")
    parser.add_argument("--base", metavar="MODEL", help="show how other programs would read an adapter of this model")
    parser.add_argument("--for", choices=READERS, help="with --base: only this program")
    parser.add_argument("--norms", action="store_true", help="with --base: show how much each layer's weights change")


def run(options: Options) -> int:
    if options["memory"]:
        print(memory_page(options["path"]))
        return 0
    if options["base"] is not None:
        return _run_readers(options)
    if options["norms"] or options["for"]:
        raise ConfigError("--norms and --for need --base")
    facts = inspect_path(options["path"])
    print(json.dumps(facts, default=vars) if options["json"] else "\n\n".join(page(*kind) for kind in facts.items()))
    return int("manifest" in facts and bool(facts["manifest"]["problems"]))


def _run_readers(options: Options) -> int:
    adapter, location = locate(options["path"], "adapter").path, locate(options["base"], "model")
    for note in base_notes(location, [adapter], {}):
        say(note)
    base = Base.read(location.path)
    facts: dict[str, Any] = {"readers": reader_facts(adapter, base, options["for"])}
    if options["norms"]:
        updates = {module["module"]: module["norm"] for module in adapter_facts(adapter)["modules"]}
        owners = {path: EMBEDDING if base.is_tied and text_path(path) == HEAD else text_path(path) for path in updates}
        weights = weight_norms(location.path, owners.values())
        known = {path: weights[owner] for path, owner in owners.items() if owner in weights}
        facts["norms"] = {path: {"update": updates[path], "weight": weight} for path, weight in known.items()}
    print(json.dumps(facts) if options["json"] else readers_page(**facts))
    return int(any(found["verdict"] != RIGHT for found in facts["readers"].values()))


def readers_page(readers: Mapping[str, Any], norms: Mapping[str, Mapping[str, float]] | None = None) -> str:
    """Return the facts of readers as text: a row for each, what is lost in which, and the norms of each layer."""
    table = [("reader", "attach", "scale", "verdict")]
    problems: dict[str, list[str]] = {}
    for title, found in readers.items():
        pairs = {(f"{taken:.4g}", f"{trained:.4g}") for trained, taken in found["scales"].values()}
        scales = sorted(taken if taken == trained else f"{taken} for {trained}" for taken, trained in pairs)
        if len(scales) > 3:
            scales[3:] = ["…"]
        attached = f"{len(found[READS])} of {sum(len(found[ruling]) for ruling in RULINGS)}"
        verdict = found["verdict"]
        if verdict == RIGHT and not READERS[title].reads_peft:
            verdict += f", by `minilora export --for {title}`"
        verdict += "" if found["tried"] else " (untried)"
        table.append((title, attached, ", ".join(scales), verdict))
        for ruling in (IGNORES, REFUSES):
            reasons = {parse_tensor_name(name)[0] or name: NUMBER.sub("*", why) for name, why in found[ruling].items()}
            for label, names in fold(reasons):
                problem = f"{len(names)} x {label}: {reasons[names[0]]}"
                problems.setdefault(problem, []).append(f"{title} {ruling}")
    lines = _align(table)
    if problems:
        lines.append(listed([f"{problem} ({', '.join(who)})" for problem, who in problems.items()]))
    if norms:
        lines += ["", *_align([*_norm_rows(norms)])]
    return printable("\n".join(lines))


def _norm_rows(norms: Mapping[str, Mapping[str, float]]) -> Iterator[Sequence[str]]:
    yield "update", "weight", "ratio", "layer"
    layers: dict[str, list[Mapping[str, float]]] = {}
    for path, norm in norms.items():
        layers.setdefault((LAYER.match(path) or [path])[0], []).append(norm)
    for layer, parts in layers.items():
        update, weight = (math.hypot(*(part[key] for part in parts)) for key in ("update", "weight"))
        yield f"{update:.3g}", f"{weight:.3g}", f"{update / weight:.2%}" if weight else "-", layer


def page(kind: str, facts: Mapping[str, Any]) -> str:
    """Return the facts as text: a line for each value, then the tables of modules and tensors."""
    shown, tables = dict(facts), []
    if kind == "adapter":
        shown["config"] = {key: value for key, value in facts["config"].items() if PEFT_DEFAULTS.get(key) != value}
        tables.append(_module_rows(shown.pop("modules")))
    if kind == "run":  # which has whatever is in run.json
        shown.pop("config", None)  # the settings are those that differ from the defaults
    elif "tensors" in facts:
        tables.append(_tensor_rows(facts["tensors"]))
        entries = list(facts["tensors"].values())
        numbers, size = sum(math.prod(entry.shape) for entry in entries), sum(entry.bytes for entry in entries)
        shown["tensors"] = f"{len(entries):,} tensors, {numbers:,} numbers, {size:,} bytes"
    path = shown.pop("path")
    values = [line for key, value in shown.items() for line in _flatten(key, value)]
    width = max(len(key) for key, _ in values)
    lines = [f"{kind}  {path}", *(f"  {key:<{width}}  {text}" for key, text in values)]
    for rows in map(list, tables):
        lines += ["", *_align(rows)] if len(rows) > 1 else []
    return printable("\n".join(line.replace("\n", r"\n") for line in lines))


def fold(kinds: Mapping[str, Hashable]) -> list[tuple[str, list[str]]]:
    """Group names of one kind that differ only in numbers, as (label, names).

    >>> fold({"a.0.w": "x", "a.1.w": "x", "a.2.w": "y", "b": "x"})
    [('a.*.w', ['a.0.w', 'a.1.w']), ('a.2.w', ['a.2.w']), ('b', ['b'])]
    """
    groups: dict[Hashable, list[str]] = {}
    for name in sorted(kinds):
        groups.setdefault((NUMBER.sub("*", name), kinds[name]), []).append(name)
    return [(NUMBER.sub("*", names[0]) if len(names) > 1 else names[0], names) for names in groups.values()]


def _flatten(key: str, value: Any, depth: int = 0) -> Iterator[tuple[str, str]]:
    """Yield (key, text) for each value in an object, as "config.r", and for each item of a list at the top."""
    if isinstance(value, Mapping) and value and depth < 3:
        for inner, entry in value.items():
            yield from _flatten(f"{key}.{inner}", entry, depth + 1)
    elif isinstance(value, list) and value and depth == 0:
        for entry in value:
            yield from _flatten(key, entry, 3)
    elif value in (None, "", [], {}):
        if depth == 0:
            yield key, "none"
    elif isinstance(value, str | float):
        yield key, f"{value:.6g}" if isinstance(value, float) else value
    else:
        text = json.dumps(value, ensure_ascii=False)
        yield key, text if len(text) <= LIST_WIDTH else f"{text[:LIST_WIDTH]} …"


def _module_rows(modules: Sequence[Mapping[str, Any]]) -> Iterator[Sequence[str]]:
    yield "n", "rank", "scale", "norm", "module"
    by_name = {module["module"]: module for module in modules}
    for label, names in fold({name: (module["rank"], module["scale"]) for name, module in by_name.items()}):
        rank, scale = by_name[names[0]]["rank"], by_name[names[0]]["scale"]
        norms = [by_name[name]["norm"] for name in names]
        low, high = f"{min(norms):.2g}", f"{max(norms):.2g}"
        yield str(len(names)), str(rank), f"{scale:.4g}", low if low == high else f"{low}..{high}", label


def _tensor_rows(tensors: Mapping[str, TensorEntry]) -> Iterator[Sequence[str]]:
    yield "n", "dtype", "shape", "name"
    for label, names in fold({name: (entry.dtype, entry.shape) for name, entry in tensors.items()}):
        dtype, shape = tensors[names[0]].dtype, tensors[names[0]].shape
        yield str(len(names)), dtype, "x".join(map(str, shape)) or "scalar", label


def _align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a line for each row; all columns but the last are aligned to the right."""
    widths = [*(max(map(len, column)) for column in zip(*rows, strict=True))][:-1]
    return ["".join(f"  {cell:>{width}}" for cell, width in zip(row, [*widths, 0], strict=True)) for row in rows]
