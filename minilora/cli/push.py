"""Upload an adapter or a model to the Hugging Face Hub.

A card is made from the run: base, hashes of the data, settings, results, and
how to load it in PEFT or transformers. A new repository is private.

Example:
  minilora push run org/name
"""

from __future__ import annotations

import argparse

from minilora.cli import Options
from minilora.tools.publish import push_to_hub


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="DIR", help="directory of a finished run, an adapter or a model")
    parser.add_argument("name", metavar="NAME", help="repository of the hub, org/name")
    parser.add_argument("--public", action="store_true", help="let everybody see a repository that is created")


def run(options: Options) -> int:
    print(push_to_hub(options["path"], options["name"], private=not options["public"]))
    return 0
