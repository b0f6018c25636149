"""Write an adapter as another program takes it.

Names, scales and matrices become those that the program reads. If it cannot
take a part, the part is named and nothing is written. Several adapters, or one
with a number after its name, as in --adapter one:0.7 --adapter two:0.3, become
their weighted sum.

Example:
  minilora export --adapter run --for vllm --out served
"""

import tempfile
from pathlib import Path

from minilora.cli import Options, Parser, say
from minilora.cli.flags import add_out, new_directory
from minilora.cli.load import add_model_flags
from minilora.cli.merge import combine, find_weighted
from minilora.cli.messages import base_notes, say_prompts
from minilora.models.prompts import copy_prompt_files
from minilora.tools.exporting import export_adapter
from minilora.tools.readers import READERS


def add_flags(parser: Parser) -> None:
    add_model_flags(parser)
    add_out(parser)
    parser.add_argument("--for", choices=READERS, required=True, help="the program that will read it")


def run(options: Options) -> int:
    with new_directory(options["out"]) as out, tempfile.TemporaryDirectory() as scratch:
        found, weights = find_weighted(options)
        for note in base_notes(found.base, found.adapters, {}):
            say(note)
        adapter = found.adapters[0]
        if weights != (1,):
            adapter = Path(scratch)
            combine(found, weights, adapter)
        export_adapter(adapter, found.base.path, options["for"], out)
        copy_prompt_files(found.adapters, out)
    print(f"adapter for {options['for']} written to {options['out']}")
    say_prompts(options["out"])
    return 0
