"""Upload an adapter or a model to the Hugging Face Hub, with a card.

Example:
  minilora push run org/name --dry-run
"""

import argparse
from pathlib import Path

from minilora.adapters.layout import CONFIG_FILE, base_model_of
from minilora.cli import Options
from minilora.errors import ConfigError
from minilora.files import BUILTIN, read_json
from minilora.models.hub import HUB_ID, reason_of

SUFFIXES = (".safetensors", ".json", ".jinja")


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="DIR", type=Path, help="directory of a finished run, an adapter or a model")
    parser.add_argument("name", metavar="NAME", help="repository of the hub, org/name")
    parser.add_argument("--public", action="store_true", help="make a new repository public; it is private by default")
    parser.add_argument("--dry-run", action="store_true", help="show the card, and upload nothing")


def run(options: Options) -> int:
    directory, name = options["path"], options["name"]
    card = model_card(directory, name)
    if options["dry_run"]:
        print(card, end="")
        return 0
    from huggingface_hub import CommitOperationAdd, HfApi  # here, because it is slow to import

    files = [file for file in sorted(directory.iterdir()) if file.suffix in SUFFIXES]  # so no checkpoints
    commit = [CommitOperationAdd("README.md", card.encode()), *(CommitOperationAdd(file.name, file) for file in files)]
    try:
        HfApi().create_repo(name, private=not options["public"], exist_ok=True)
        print(HfApi().create_commit(name, commit, commit_message="Upload with minilora").commit_url)
    except Exception as error:  # the hub's own, and those of the HTTP library that its version uses
        raise ConfigError(f"{name}: not uploaded: {reason_of(error)}") from error
    return 0


def model_card(directory: Path, name: str) -> str:
    """Return the card in Markdown: the base, held-out loss and accuracy before and after, and how to load it."""
    if (directory / CONFIG_FILE).is_file():
        base, library, loader = base_model_of(directory) or "", "peft", "AutoPeftModelForCausalLM"
    elif (directory / "config.json").is_file():
        base, library, loader = "", "transformers", "AutoModelForCausalLM"
    else:
        raise ConfigError(f"{directory}: holds no {CONFIG_FILE} and no config.json; need an adapter or a model")
    tags = "lora, minilora" if library == "peft" else "minilora"
    lines = ["---", f"library_name: {library}", f"tags: [{tags}]"]
    lines += [f"base_model: {base.partition('@')[0]}"] if HUB_ID.fullmatch(base) and base != BUILTIN else []
    lines += ["---", "", f"# {name}", "", f"A LoRA adapter of `{base}`." if base else "A model.", ""]
    if (directory / "summary.json").is_file():
        summary = read_json(directory / "summary.json")
        for when, scores in (("before", summary["before"]), ("after", summary["after"])):
            named = (("held-out loss", scores["loss"]), ("accuracy", scores["accuracy"]))
            known = [f"{what} {value:.4f}" for what, value in named if value is not None]
            lines += [f"- {when}: {', '.join(known)}"] if known else []
    code = f'from {library} import {loader}\n\nmodel = {loader}.from_pretrained("{name}")'
    return "\n".join([*lines, "", "```python", code, "```"]) + "\n"
