"""Quantize a model to 4 bits (NF4).

The result can be read by transformers with bitsandbytes, and by all commands.

Example:
  minilora quantize --model path/to/model --out model-nf4
"""

from __future__ import annotations

from pathlib import Path

from minilora.cli import Options, Parser
from minilora.cli.flags import add_fields, add_out, from_flags, new_directory
from minilora.errors import ConfigError
from minilora.files import BUILTIN, tensor_files
from minilora.models.bitsandbytes import QuantizeConfig, count_weights, is_four_bit
from minilora.models.checkpoint import (
    build_on_meta,
    load_model,
    pick_device,
    read_config,
    save_model_files,
    stored_dtype,
    stored_weights,
)
from minilora.models.hub import locate
from minilora.models.tokenizer import find_tokenizer


def add_flags(parser: Parser) -> None:
    parser.add_argument(
        "--model",
        default=BUILTIN,
        help=f"directory of the model, or org/name[@revision] on the Hugging Face Hub (default: {BUILTIN})",
    )
    add_out(parser)
    parser.add_argument("--device", default="auto", help="device to compute on: cpu, cuda, mps (default: auto)")
    add_fields(parser, QuantizeConfig, "quantization", but=("quantize",))


def run(options: Options) -> int:
    device = pick_device(options["device"])
    config = from_flags(QuantizeConfig, {**options, "quantize": "nf4"})
    location = locate(options["model"], "model")
    read = read_config(location.path)
    if is_four_bit(read.source):
        raise ConfigError(f"{location.name}: is quantized already")
    dtype = stored_dtype(read.source)
    model = load_model(location.path, dtype, "meta", config)
    weights = stored_weights(location.path, build_on_meta(read), dtype, device, config)
    with new_directory(options["out"]) as out:
        save_model_files(model, out, find_tokenizer(location.name), weights=weights)
        size = _describe_size(out)
    print(f"{size}\nmodel written to {options['out']}")
    return 0


def _describe_size(directory: Path) -> str:
    """Describe the bits per weight of the quantized tensors, and of all files."""
    files = tensor_files(directory)
    count = count_weights(files)
    size = sum(path.stat().st_size for path in {file.path for file in files.values()})
    return (
        f"{8 * count.packed_bytes / count.packed:.3f} bits per weight for {count.packed:,} quantized weights; "
        f"{8 * size / count.weights:.3f} for all {count.weights:,} weights in {size:,} bytes of files"
    )
