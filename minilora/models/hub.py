"""Models and adapters by name: a path, what comes with minilora, or a repository on the Hugging Face Hub.

    ./a/path              a directory, if it exists
    minilora/builtin      the small model that comes with minilora
    org/name              the newest commit of a repository
    org/name@revision     a branch, a tag or a commit of it

Only files that hold no code are fetched, and only from the top of a repository, into the cache of `huggingface_hub`.
Its environment variables apply (`HF_HOME`, `HF_ENDPOINT`, `HF_TOKEN`, `HF_HUB_OFFLINE`).
"""

import re
from pathlib import Path
from typing import Literal, NamedTuple

from minilora.errors import FormatError, in_recipe
from minilora.files import ASSETS, BUILTIN

Kind = Literal["model", "tokenizer", "adapter"]
GGUF = f"a GGUF file has to become a directory first; {in_recipe('from_gguf')}"
PART = r"\w(?:[\w.-]*\w)?"
HUB_ID = re.compile(rf"(?!.*\.\.)(?![^@]*--)({PART}/{PART})(?:@(\w(?:[\w./-]*\w)?))?", re.ASCII)
PINNED = re.compile(rf"({PART}/{PART})@([0-9a-f]{{40}})", re.ASCII)

# A star matches separators too: a name with one could lead out of the cache.
NEVER = ["*/*", "*\\*", "*:*", "consolidated*"]


class Location(NamedTuple):
    """A path, and a name that will mean the same files later: that of a repository has its commit."""

    path: Path
    name: str


NEEDED: dict[Kind, str] = {  # the files without which a repository is of no use
    "model": "*.safetensors",
    "tokenizer": "tokenizer.json",
    "adapter": "adapter_model.safetensors",
}


def locate(name_or_path: str | Path, kind: Kind) -> Location:
    """Return the `Location` that a name means; a repository of the Hub is downloaded. A `Path` never is one."""
    name, path = str(name_or_path), Path(name_or_path)
    if not name:
        raise FormatError(f"the name of the {kind} is empty; give a directory or org/name, or leave it out")
    if name == BUILTIN and kind != "adapter":
        return Location(ASSETS / "model", name)
    how = f"; {GGUF}" if "gguf" in name.lower() else ""
    if path.is_dir():
        if kind == "adapter" and not (path / "adapter_config.json").is_file():
            if (path / "run.json").is_file():
                raise FormatError(f"{path}: is an unfinished run; repeat its finetune command, or name a checkpoint")
            if inside := sorted(str(config.parent) for config in path.glob("*/adapter_config.json")):
                raise FormatError(f"{path}: has no adapter_config.json; name one of its adapters: {inside[:5]}")
        if kind == "model" and not (path / "config.json").is_file():
            raise FormatError(f"{path}: is not a model: has no config.json{how or '; an adapter goes to --adapter'}")
        return Location(path, name)
    is_path = isinstance(name_or_path, Path) or path.exists() or name == BUILTIN
    if HUB_ID.fullmatch(name) and not is_path:
        return _download(name, kind, how)
    if kind == "model":
        how = how or " (such as HuggingFaceTB/SmolLM2-135M-Instruct); see docs/models.md"
    raise FormatError(f"{kind} {path}: no such directory, and not 'org/name' or 'org/name@revision' of the Hub{how}")


def unpinned(name: str) -> tuple[str, str | None]:
    """Divide the name of a `Location` as PEFT does: into the repository and the commit, or a path and None."""
    pinned = PINNED.fullmatch(name)
    return (pinned[1], pinned[2]) if pinned else (name, None)


def _download(name: str, kind: Kind, how: str) -> Location:
    import huggingface_hub  # here, because it takes long

    repository, _, revision = name.partition("@")
    try:
        directory = huggingface_hub.snapshot_download(
            repository,
            revision=revision or None,
            allow_patterns=[NEEDED[kind], "*.json", "*.jinja"],
            ignore_patterns=NEVER,
        )
    except Exception as error:  # of the hub, or of its HTTP library
        is_offline = isinstance(error, huggingface_hub.errors.LocalEntryNotFoundError)
        reason = "the Hub cannot be reached" if is_offline else f"no {kind} from the Hub: {reason_of(error)}"
        raise FormatError(f"{name}: is not a directory, and {reason}") from error
    path = Path(directory)
    if not any(path.glob(NEEDED[kind])):
        raise FormatError(f"{name}: the repository has no {NEEDED[kind]} at its top{how}")
    return Location(path, f"{repository}@{path.name}")


def reason_of(error: Exception) -> str:
    """Return another library's message of an error, as one line."""
    return " ".join(str(error).split()) or type(error).__name__
