"""Quantize a model to 4 bits (NF4).

The result can be read by transformers with bitsandbytes, and by all commands.

Example:
  minilora quantize --model path/to/model --out model-nf4
"""

from __future__ import annotations

import math
from pathlib import Path

from minilora.cli import Options, Parser
from minilora.cli.flags import add_fields, add_out, from_flags, new_directory
from minilora.errors import ConfigError
from minilora.files import BUILTIN
from minilora.llama import Llama
from minilora.models import checkpoint
from minilora.models.bitsandbytes import QuantizeConfig, is_four_bit
from minilora.models.config import read_config
from minilora.models.hub import locate
from minilora.models.tokenizer import find_tokenizer
from minilora.nf4 import NF4Linear


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
    location = locate(options["model"], "model")
    source = read_config(location.path).source
    if is_four_bit(source):
        raise ConfigError(f"{location.name}: is quantized already")
    config = from_flags(QuantizeConfig, {**options, "quantize": "nf4"})
    dtype, device = checkpoint.stored_dtype(source), checkpoint.usable_device(options["device"])
    model = checkpoint.load_model(location.name, dtype, "meta", config)
    bare = checkpoint.build_on_meta(model.config)
    weights = checkpoint.stored_weights(location.path, bare, dtype, device, config)
    with new_directory(options["out"]) as out:
        checkpoint.save_model_files(model, out, find_tokenizer(location.name), weights=weights)
        size = _describe_size(model, out)
    print(f"{size}\nmodel written to {options['out']}")
    return 0


def _describe_size(model: Llama, directory: Path) -> str:
    """Describe the bits per weight of the quantized linears, and the size of all files."""
    packed = [module for module in model.modules() if isinstance(module, NF4Linear)]
    count = sum(math.prod(linear.layout.shape) for linear in packed)
    size = sum(part.nbytes for linear in packed for part in linear.parts if part is not None)
    total = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    return f"{8 * size / count:.3f} bits per weight for {count:,} quantized weights; {total:,} bytes of files"
