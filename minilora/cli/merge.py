"""minilora merge: fold adapters into a model's weights."""

from __future__ import annotations

import argparse
from pathlib import Path

from minilora.cli.command import Command, Options, add_model_flags, base_of, load
from minilora.errors import ConfigError
from minilora.hub import fetch
from minilora.lora.attach import merge
from minilora.model.checkpoint import save_model
from minilora.run import holds_files
from minilora.storage import read_json


def _add_flags(parser: argparse.ArgumentParser) -> None:
    add_model_flags(parser, many_adapters=True)
    parser.add_argument("--out", required=True, help="directory to write; it must not hold files")


def _run(options: Options) -> int:
    out = Path(options["out"])
    if not options["adapter"]:
        raise ConfigError("there is nothing to merge: give --adapter")
    if holds_files(out):
        raise ConfigError(f"{out}: holds files; give another --out")
    if options["dtype"] == "auto":  # here the checkpoint's own, even where this machine computes it slowly
        source = read_json(fetch(base_of(options), "tokenizer") / "config.json")
        options["dtype"] = source.get("dtype") or source.get("torch_dtype") or "float32"
    loaded = load(options)
    merge(loaded.model)
    save_model(loaded.model, out, loaded.tokenizer)
    print(f"merged model written to {out}")
    return 0


COMMAND = Command(
    name="merge",
    help="fold adapters into a model's weights and write the model",
    about="Fold adapters into a model's weights and write the model.",
    example="minilora merge --adapter run --out merged",
    add_flags=_add_flags,
    run=_run,
)
