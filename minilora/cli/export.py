"""Write an adapter for another program: vLLM, llama.cpp, mlx-lm or PEFT.

The adapter is written with the names, scales and layout that the program
reads. If it cannot read a part, the error names the part.

Example:
  minilora export --adapter run --for vllm --out served
"""

from minilora.cli import Options, Parser, say
from minilora.cli.flags import add_out, new_directory
from minilora.cli.load import ADAPTER_HELP, base_of
from minilora.cli.messages import base_notes, say_prompts
from minilora.errors import ConfigError
from minilora.models.hub import locate
from minilora.models.prompts import copy_prompt_files
from minilora.tools.exporting import export_adapter
from minilora.tools.readers import READERS


def add_flags(parser: Parser) -> None:
    parser.add_argument("--adapter", action="append", required=True, help=ADAPTER_HELP)
    parser.add_argument("--model", help="the base model: a directory or a Hub name (default: that of the adapter)")
    add_out(parser)
    parser.add_argument("--for", choices=READERS, required=True, help="the program that will read it")


def run(options: Options) -> int:
    if len(options["adapter"]) > 1:
        advice = "in Python, ml.combine_adapters makes one adapter of several"
        raise ConfigError(f"export takes one --adapter, found {options['adapter']}; {advice}")
    adapter = locate(options["adapter"][0], "adapter").path
    base = locate(base_of(options["model"], [adapter]), "model")
    for note in base_notes(base, [adapter], {}):
        say(note)
    with new_directory(options["out"]) as out:
        export_adapter(adapter, base.path, options["for"], out)
        copy_prompt_files([adapter], out)
    print(f"adapter for {options['for']} written to {options['out']}")
    say_prompts(options["out"])
    return 0
