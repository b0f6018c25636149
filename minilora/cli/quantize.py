"""Quantize a model to 4 bits (NF4).

The result is read by all commands, and by transformers with bitsandbytes.

Example:
  minilora quantize --model path/to/model --out model-nf4
"""

from minilora.cli import Options, Parser, say
from minilora.cli.flags import add_fields, add_out, from_flags, new_directory
from minilora.errors import ConfigError
from minilora.files import BUILTIN
from minilora.models import checkpoint
from minilora.models.bitsandbytes import QuantizeConfig, is_four_bit
from minilora.models.config import describe_other_parts, read_config
from minilora.models.hub import locate
from minilora.models.tokenizer import find_tokenizer
from minilora.runs.settings import DEVICE_HELP


def add_flags(parser: Parser) -> None:
    parser.add_argument(
        "--model",
        default=BUILTIN,
        help=f"directory of the model, or org/name[@revision] on the Hugging Face Hub (default: {BUILTIN})",
    )
    add_out(parser)
    parser.add_argument("--device", default="auto", help=f"{DEVICE_HELP} (default: auto)")
    add_fields(parser, QuantizeConfig, "quantization", but=("quantize",))


def run(options: Options) -> int:
    location = locate(options["model"], "model")
    source = read_config(location.path).source
    if is_four_bit(source):
        raise ConfigError(f"{location.name}: the model is quantized already; fine-tune or load it as it is")
    if parts := describe_other_parts(location.path):
        say(f"only the text model is written, not {parts}")
    config = from_flags(QuantizeConfig, {**options, "quantize": "nf4"})
    dtype, device = checkpoint.stored_dtype(source), checkpoint.usable_device(options["device"])
    model = checkpoint.load_model(location.name, dtype, "meta", config)
    bare = checkpoint.build_on_meta(model.config)
    weights = checkpoint.stored_weights(location.path, bare, dtype, device, config)
    with new_directory(options["out"]) as out:
        checkpoint.save_model_files(model, out, find_tokenizer(location.name), weights=weights)
    print(f"model written to {options['out']}")
    return 0
