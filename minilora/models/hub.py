"""Models, adapters and data by name: a path, what comes with minilora, or a repository on the Hugging Face Hub.

    ./a/path              a file or directory, if it exists
    minilora/builtin      the small model, or its data, that comes with minilora
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

Kind = Literal["model", "tokenizer", "adapter", "dataset"]
GGUF = f"a GGUF file has to become a directory first; {in_recipe('from_gguf')}"
DATA_ENDINGS = (".jsonl", ".json", ".csv", ".tsv")
PART = r"\w(?:[\w.-]*\w)?"
HUB_ID = re.compile(rf"(?!.*\.\.)(?![^@]*--)({PART}/{PART})(?:@(\w(?:[\w./-]*\w)?))?", re.ASCII)
PINNED = re.compile(rf"({PART}/{PART})@([0-9a-f]{{40}})", re.ASCII)

# A star matches separators too: a name with one could lead out of the cache.
NEVER = ["*/*", "*\\*", "*:*", "consolidated*", "dataset_infos.json"]


class Location(NamedTuple):
    """A path, and a name that will mean the same files later: that of a repository has its commit."""

    path: Path
    name: str


BUILTINS: dict[Kind, Path] = {"model": ASSETS / "model", "tokenizer": ASSETS / "model", "dataset": ASSETS / "data"}
NEEDED: dict[Kind, tuple[str, ...]] = {  # of these files, a repository has at least one
    "model": ("*.safetensors",),
    "tokenizer": ("tokenizer.json",),
    "adapter": ("adapter_model.safetensors",),
    "dataset": tuple(f"*{ending}" for ending in DATA_ENDINGS),
}


def fetch(name_or_path: str | Path, kind: Kind) -> Path:
    """Return the path of `locate`."""
    return locate(name_or_path, kind).path


def locate(name_or_path: str | Path, kind: Kind) -> Location:
    """Find what a name means, and fetch it if that is a repository of the hub. A `Path` is never a repository.

    Raises:
        FormatError: there is no such file, directory or repository; it cannot be fetched, or has no file of a format
            that minilora reads.
    """
    name, path = str(name_or_path), Path(name_or_path)
    if not name:
        raise FormatError("the name is empty; leave it out, or name something")
    if name == BUILTIN and kind in BUILTINS:
        return Location(BUILTINS[kind], name)
    if kind != "dataset" and (path.suffix == ".gguf" or (any(path.glob("*.gguf")) and not any(path.glob("*.json")))):
        raise FormatError(f"{path}: {GGUF}")
    if path.is_dir() or (kind == "dataset" and path.exists()):
        if kind == "adapter" and not (path / "adapter_config.json").is_file():
            _explain_missing_adapter(path)
        return Location(path, name)
    is_path = isinstance(name_or_path, Path) or path.exists() or name == BUILTIN
    if HUB_ID.fullmatch(name) and not is_path and not (kind == "dataset" and name.endswith(DATA_ENDINGS)):  # mistyped
        return _download(name, kind)
    missing = "no such file or directory" if kind == "dataset" else "no such directory"
    raise FormatError(f"{path}: {missing}, and not 'org/name' or 'org/name@revision' of the Hugging Face Hub")


def _explain_missing_adapter(path: Path) -> None:
    """Raise a `FormatError` if a directory without an adapter is that of a run, or has adapters in folders."""
    if (path / "run.json").is_file():
        raise FormatError(f"{path}: is an unfinished run; repeat its finetune command, or name one of its checkpoints")
    if inside := sorted(str(config.parent) for config in path.glob("*/adapter_config.json")):
        raise FormatError(f"{path}: has no adapter_config.json; name one of its folders with an adapter: {inside[:5]}")


def unpinned(name: str) -> tuple[str, str | None]:
    """Divide the name of a `Location` as PEFT does: into the repository and the commit, or a path and None."""
    pinned = PINNED.fullmatch(name)
    return (pinned[1], pinned[2]) if pinned else (name, None)


def _download(name: str, kind: Kind) -> Location:
    import huggingface_hub  # here, because it takes long

    repository, _, revision = name.partition("@")
    try:
        directory = huggingface_hub.snapshot_download(
            repository,
            repo_type="dataset" if kind == "dataset" else "model",
            revision=revision or None,
            allow_patterns=[*NEEDED[kind], *(() if kind == "dataset" else ("*.json", "*.jinja"))],
            ignore_patterns=NEVER,
        )
    except Exception as error:  # of the hub, or of its HTTP library
        raise FormatError(f"{name}: no such directory, and no {kind} from the hub: {reason_of(error)}") from error
    path = Path(directory)
    if not any(any(path.glob(pattern)) for pattern in NEEDED[kind]):
        convert = f'; in Python, datasets.load_dataset("{repository}", split="train").to_json("rows.jsonl") writes one'
        how = convert if kind == "dataset" else f"; {GGUF}" if "gguf" in name.lower() else ""
        raise FormatError(f"{name}: the repository has no {' or '.join(NEEDED[kind])} at its top{how}")
    return Location(path, f"{repository}@{path.name}")


def reason_of(error: Exception) -> str:
    """Return another library's message of an error, as one line."""
    return " ".join(str(error).split()) or type(error).__name__
