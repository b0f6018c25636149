"""Models, adapters and data by name: a path, what comes with minilora, or a repository on the Hugging Face Hub.

    ./a/path              a file or directory, if it exists
    minilora/builtin      the small model, or its data, that comes with minilora
    org/name              the newest commit of a repository
    org/name@revision     a branch, a tag or a commit of it

Only files that hold no code are fetched, and only from the top of a repository, into the cache of `huggingface_hub`.
Its environment variables apply (`HF_HOME`, `HF_ENDPOINT`, `HF_TOKEN`, `HF_HUB_OFFLINE`).
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any, Literal, NamedTuple

from minilora.errors import FormatError
from minilora.files import ASSETS, BUILTIN, finish_commit

Kind = Literal["model", "tokenizer", "adapter", "dataset"]
DATA_ENDINGS = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
PART = r"\w(?:[\w.-]*\w)?"
HUB_ID = re.compile(rf"(?!.*\.\.)(?![^@]*--)({PART}/{PART})(?:@(\w(?:[\w./-]*\w)?))?", re.ASCII)
PINNED = re.compile(rf"({PART}/{PART})@([0-9a-f]{{40}})", re.ASCII)

# A star matches separators too: a name with one could lead out of the cache.
NEVER = ["*/*", "*\\*", "*:*", "consolidated*", "dataset_infos.json"]


class Location(NamedTuple):
    """A path, and a name that will mean the same files later: that of a repository has its commit."""

    path: Path
    name: str


MEANINGS: dict[Kind, str] = {
    "model": "no such directory; a model is a directory with config.json, 'minilora/builtin'",
    "tokenizer": "no such directory; a tokenizer is a directory with tokenizer.json, 'minilora/builtin'",
    "adapter": "no such directory; an adapter is a directory with adapter_config.json",
    "dataset": "no such file or directory; data is a file, a directory, 'minilora/builtin'",
}
CONFIGS: dict[Kind, str] = {"model": "config.json", "adapter": "adapter_config.json"}
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
    if path.is_dir() or (kind == "dataset" and path.exists()):
        finish_commit(path)
        held = [other for other, file in CONFIGS.items() if (path / file).is_file()]
        if kind in CONFIGS and held and kind not in held:
            raise FormatError(f"{path}: holds {CONFIGS[held[0]]} and no {CONFIGS[kind]}; name it as the {held[0]}")
        if kind == "adapter" and not held and (path / "run.json").is_file():
            newest = max(path.glob("checkpoints/step-*"), key=lambda each: (len(each.name), each.name), default=None)
            found = f", or use its newest checkpoint, {newest}" if newest else "; it has no checkpoint yet"
            raise FormatError(f"{path}: is an unfinished run; repeat its finetune command to resume it{found}")
        return Location(path, name)
    is_file = path.exists() or (kind == "dataset" and name.endswith(DATA_ENDINGS))  # maybe a mistyped one
    hub_id = None if is_file or isinstance(name_or_path, Path) or name == BUILTIN else HUB_ID.fullmatch(name)
    if hub_id:
        return _download(hub_id[1], hub_id[2], kind)
    there = [each.name for each in path.parent.glob("*") if kind == "dataset" or each.is_dir()]
    if near := difflib.get_close_matches(path.name, there, n=1):
        raise FormatError(f"{path}: {MEANINGS[kind].partition(';')[0]}; did you mean {path.parent / near[0]}?")
    raise FormatError(f"{path}: {MEANINGS[kind]}, 'org/name' or 'org/name@revision' of the hub")


def unpinned(name: str) -> tuple[str, str | None]:
    """Divide the name of a `Location` as PEFT does: into the repository and the commit, or a path and None."""
    found = PINNED.fullmatch(name)
    return (found[1], found[2]) if found else (name, None)


def with_revision(name: str, revision: str | None) -> str:
    """Return the name of a repository with a revision; the name of a path is not changed."""
    return f"{name}@{revision}" if revision and HUB_ID.fullmatch(name) else name


def _download(repository: str, revision: str | None, kind: Kind) -> Location:
    import huggingface_hub  # here, because it takes long

    what = f"{repository}@{revision}" if revision else repository
    try:
        directory = huggingface_hub.snapshot_download(
            repository,
            repo_type="dataset" if kind == "dataset" else "model",
            revision=revision,
            allow_patterns=[*NEEDED[kind], *(() if kind == "dataset" else ("*.json", "*.jinja"))],
            ignore_patterns=NEVER,
            tqdm_class=_bar(),
        )
    except Exception as error:  # of the hub, or of its HTTP library
        raise FormatError(f"{what}: no such directory, and no {kind} from the hub: {reason_of(error)}") from error
    path = Path(directory)
    if not any(found for pattern in NEEDED[kind] for found in path.glob(pattern)):
        accepted = " or ".join(NEEDED[kind])
        raise FormatError(f"{what}: the repository has no {accepted} at its top; other formats are not read")
    return Location(path, f"{repository}@{path.name}")


def _bar() -> type[Any]:
    """Return the hub's progress bar, which is hidden without a terminal."""
    from huggingface_hub.utils.tqdm import tqdm

    class Bar(tqdm):
        def __init__(self, *values: Any, **options: Any) -> None:
            super().__init__(*values, **{"disable": None, **options})

    return Bar


def reason_of(error: Exception) -> str:
    """Return in one line why something could not be fetched."""
    from huggingface_hub import errors

    login = "log in (HF_TOKEN, or `hf auth login`)"
    if isinstance(error, errors.GatedRepoError):  # a RepositoryNotFoundError too
        return f"it is gated; accept its terms on its page, and {login}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"there is no such repository; if it is private, {login}"
    if isinstance(error, errors.RevisionNotFoundError):
        return "the repository has no such revision"
    if isinstance(error.__cause__, errors.OfflineModeIsEnabled):
        return "it is not in the cache, and HF_HUB_OFFLINE is set"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return f"it is not in the cache, and the hub cannot be reached ({_line(error.__cause__)})"
    return _line(error)


def _line(error: BaseException | None) -> str:
    """Return the first line of an error's text, or its kind."""
    return next(iter(str(error).splitlines()), type(error).__name__)
