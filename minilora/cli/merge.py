"""Merge adapters into a model's weights and save the model.

Weights are read, merged and written one at a time. The merged model keeps the
chat template and system prompt of the first adapter that has them. A Modelfile
for Ollama is written too, if Ollama can prompt the model as in training.

Example:
  minilora merge --adapter run --out merged
"""

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from minilora.adapters.layout import WEIGHTS_FILE
from minilora.cli import Options, Parser, say
from minilora.cli.flags import add_out, new_directory
from minilora.cli.load import MERGED, Sources, add_model_flags, check_not_merged, find_sources
from minilora.cli.messages import base_notes, say_prompts
from minilora.errors import ConfigError
from minilora.files import read_json, sha256_of, write_json
from minilora.models.bitsandbytes import QuantizeConfig, describe_quantization
from minilora.models.checkpoint import load_model, usable_device
from minilora.models.prompts import Prompts
from minilora.runs.cards import write_cards
from minilora.tools.merging import Merge, MergeTarget, RelativeError, merge_directory

NOTABLE = 0.1  # relative error of a merge above which advice is printed


def add_flags(parser: Parser) -> None:
    dtype = "number format of the merged weights; auto: the checkpoint's; float32 rounds less"
    add_model_flags(parser, "; repeat it to merge several", dtype)
    add_out(parser)
    parser.add_argument(
        "--target",
        choices=get_args(MergeTarget),
        help="the weights to add adapters to: dequantized, the 4-bit weights made dense (default after training on a "
        "4-bit base); original, the 16-bit weights (otherwise); requantized, as dequantized, but saved in 4 bits",
    )


def run(options: Options) -> int:
    if not options["adapter"]:
        raise ConfigError("give the adapter to merge: --adapter DIR")
    with new_directory(options["out"]) as out:
        written = _write_model(options, find_sources(options), out)
    print(f"{written} written to {options['out']}")
    say_prompts(options["out"])
    if Path(options["out"], "Modelfile").is_file():
        say(f"next, for Ollama, in {options['out']}:\n  ollama create mine -f Modelfile\n  ollama run mine")
    return 0


def _write_model(options: Options, found: Sources, out: Path) -> str:
    """Merge the adapters, and describe the error and what was written."""
    target = options["target"]
    check_not_merged(found.base, found.adapters)
    quantize = QuantizeConfig() if target == "original" else found.quantize
    quantization = describe_quantization(load_model(found.base.path, "auto", "meta", quantize))
    device = usable_device(options["device"])
    merge = Merge(found.base.path, found.adapters, target, found.quantize, options["dtype"], device)
    for note in base_notes(found.base, found.adapters, quantization):
        say(note)
    tokenizer = found.tokenizer
    if tokenizer and tokenizer.prompts != Prompts():  # in the template of a run they are already
        tokenizer = tokenizer.with_prompts(tokenizer.prompts)
    error = merge_directory(merge, out, tokenizer)
    if tokenizer:  # whose template may end an answer with another token than the base's files name
        path = out / "generation_config.json"
        values = read_json(path) if path.exists() else {}
        write_json(path, {**values, "eos_token_id": sorted(tokenizer.stop_ids)})
    _record_adapters(out, options["adapter"], found.adapters)
    write_cards(out)
    return f"{_describe_error(error, merge.rows)}\nmerged model"


def _record_adapters(out: Path, names: Sequence[str], adapters: Sequence[Path]) -> None:
    """Record in config.json which adapters the model holds, so that none is applied a second time."""
    values = read_json(out / "config.json")
    merged = values[MERGED] if isinstance(values.get(MERGED), list) else []
    for name, path in zip(names, adapters, strict=True):
        merged = [*merged, {"name": Path(name).name, "sha256": sha256_of(path / WEIGHTS_FILE)}]
    write_json(out / "config.json", {**values, MERGED: merged})


def _describe_error(error: RelativeError | None, rows: int) -> str:
    if error is None:
        return "no update of low rank changes a weight, so there is no rounding error to report"
    text = f"the layers' outputs differ from the trained ones by {error.value:.1%} of the adapter's effect"
    if error.margin:
        text += f" (± {error.margin:.2%}: {rows} rows of each weight were measured)"
    if error.value > NOTABLE:
        text += "\nthis is rounding, and the loss usually changes far less: see `minilora eval`, or use --dtype float32"
    return text
