"""Upload an adapter or a model to the Hugging Face Hub, with a card.

Paths on your machine are not uploaded: run.json stays here, and if the base
model is a directory, --base-name gives its name on the Hub.

Example:
  minilora push run org/name --dry-run
"""

import argparse
import json
import re
from pathlib import Path

from minilora.adapters.layout import CONFIG_FILE, WEIGHTS_FILE, base_model_of
from minilora.cli import Options
from minilora.errors import ConfigError
from minilora.files import BUILTIN, read_json
from minilora.models.checkpoint import MODEL_FILES
from minilora.models.hub import HUB_ID, PINNED, reason_of
from minilora.models.tokenizer import TOKENIZER_FILES
from minilora.runs.cards import model_card

UPLOADED = (CONFIG_FILE, WEIGHTS_FILE, *MODEL_FILES, *TOKENIZER_FILES, "Modelfile", "summary.json")
CONFIGS = (CONFIG_FILE, "config.json", "tokenizer_config.json")  # which may name paths


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="DIR", type=Path, help="directory of a finished run, an adapter or a model")
    parser.add_argument("name", metavar="NAME", help="name of the repository on the Hub, org/name")
    parser.add_argument(
        "--base-name",
        metavar="ORG/NAME",
        help="name of the base model on the Hub, org/name[@revision] (default: the one that the adapter records)",
    )
    parser.add_argument("--public", action="store_true", help="make a new repository public; it is private by default")
    parser.add_argument("--dry-run", action="store_true", help="print the card, and upload nothing")


def run(options: Options) -> int:
    directory, name = options["path"], options["name"]
    if not HUB_ID.fullmatch(name) or "@" in name:
        raise ConfigError(f"{name!r} is not the name of a repository; give it as org/name")
    base = find_base_name(directory, options["base_name"])
    card = model_card(directory, name, base)
    if options["dry_run"]:
        print(card, end="")
        return 0
    from huggingface_hub import CommitOperationAdd, HfApi  # here, because it is slow to import

    files = sorted({file for pattern in UPLOADED for file in directory.glob(pattern)})
    commit = [CommitOperationAdd("README.md", card.encode())]
    commit += [CommitOperationAdd(file.name, without_paths(file, base)) for file in files]
    try:
        HfApi().create_repo(name, private=not options["public"], exist_ok=True)
        print(HfApi().create_commit(name, commit, commit_message="Upload with minilora").commit_url)
    except Exception as error:  # the hub's own, and those of the HTTP library that its version uses
        reason = reason_of(error)
        advice = "; log in with `hf auth login`" if re.search(r"\b(401|403)\b", reason) else ""
        raise ConfigError(f"{name}: not uploaded: {reason}{advice}") from error
    return 0


def find_base_name(directory: Path, given: str | None) -> str:
    """Return the name of an adapter's base on the Hub: the given one, or what the adapter records.

    A model has none, unless one is given: "".
    """
    is_adapter = (directory / CONFIG_FILE).is_file()
    if not is_adapter and not (directory / "config.json").is_file():
        raise ConfigError(f"{directory}: has no {CONFIG_FILE} and no config.json; need an adapter or a model")
    if given is not None and (not HUB_ID.fullmatch(given) or given == BUILTIN):
        raise ConfigError(f"--base-name: found {given!r}, need org/name or org/name@revision")
    if given is not None or not is_adapter:
        return given or ""
    recorded = base_model_of(directory) or ""
    is_run = (directory / "run.json").is_file()  # which records the commit of a repository
    is_name = HUB_ID.fullmatch(recorded) and recorded != BUILTIN and not Path(recorded).exists()
    if PINNED.fullmatch(recorded) or (is_name and not is_run):
        return recorded
    raise ConfigError(
        f"{directory}: the base model is {recorded!r}, which is not a name on the Hub; give --base-name ORG/NAME"
    )


def without_paths(file: Path, base: str) -> Path | bytes:
    """Return a file to upload; of a config with paths of this machine, its content without them."""
    if file.name not in CONFIGS:
        return file
    values = read_json(file)
    cleaned = {key: value for key, value in values.items() if not key.endswith(("name_or_path", "_file"))}
    if file.name == CONFIG_FILE:
        repository, _, revision = base.partition("@")
        cleaned |= {"base_model_name_or_path": repository, "revision": revision or None}
    return file if cleaned == values else json.dumps(cleaned, indent=2, ensure_ascii=False).encode()
