"""Models, adapters and data by name: a path, what comes with minilora, or a repository of the Hugging Face hub.

    ./a/path              a file or directory that exists is itself, whatever it is called
    minilora/builtin      the small model, or its data, in minilora itself
    org/name              the newest commit of a repository
    org/name@revision     a branch, a tag or a commit of it

Only files that hold no code are fetched, and only from the top of a repository. They lie in the hub's own cache, a
directory for each commit; where that is, which server is asked, as whom and whether at all (`HF_HOME`, `HF_ENDPOINT`,
`HF_TOKEN`, `HF_HUB_OFFLINE`) is for `huggingface_hub` to say.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from minilora.errors import FormatError
from minilora.storage import ASSETS, BUILTIN

Kind = Literal["model", "tokenizer", "adapter", "dataset"]
DATA_ENDINGS = (".jsonl", ".json", ".jsonl.gz", ".json.gz")
PART = r"\w(?:[\w.-]*\w)?"
HUB_ID = re.compile(rf"(?!.*\.\.)(?![^@]*--)({PART}/{PART})(?:@(\w(?:[\w./-]*\w)?))?", re.ASCII)
PINNED = re.compile(rf"({PART}/{PART})@([0-9a-f]{{40}})", re.ASCII)

# Patterns, in which a star stands for separators too: a name with one could lead out of the cache.
NEVER = ["*/*", "*\\*", "*:*", "consolidated*", "dataset_infos.json"]


@dataclass(frozen=True)
class Location:
    """Where something lies, and the name that will mean the same files later: that of a repository has its commit."""

    path: Path
    name: str


@dataclass(frozen=True)
class _Rules:
    """A kind in words; what of a repository is fetched, one file of `needed` at least; what comes with minilora."""

    meaning: str
    needed: tuple[str, ...]
    others: tuple[str, ...] = ()
    builtin: Path | None = None


CONFIGS: dict[Kind, str] = {"model": "config.json", "adapter": "adapter_config.json"}
RULES: dict[Kind, _Rules] = {
    "model": _Rules(
        "no such directory; a model is a directory with config.json, 'minilora/builtin'",
        needed=("*.safetensors",),
        others=("*.json", "*.jinja"),
        builtin=ASSETS / "model",
    ),
    "tokenizer": _Rules(
        "no such directory; a tokenizer is a directory with tokenizer.json, 'minilora/builtin'",
        needed=("tokenizer.json",),
        others=("*.json", "*.jinja"),
        builtin=ASSETS / "model",
    ),
    "adapter": _Rules(
        "no such directory; an adapter is a directory with adapter_config.json",
        needed=("adapter_model.safetensors",),
        others=("adapter_config.json", "chat_template.jinja", "run.json"),
    ),
    "dataset": _Rules(
        "no such file or directory; data is a file, a directory, 'minilora/builtin'",
        needed=tuple(f"*{ending}" for ending in DATA_ENDINGS),
        builtin=ASSETS / "data",
    ),
}


def fetch(name_or_path: str | Path, kind: Kind) -> Path:
    """The directory of a model, tokenizer or adapter, the file or directory of a data set; errors as in `locate`."""
    return locate(name_or_path, kind).path


def locate(name_or_path: str | Path, kind: Kind) -> Location:
    """Find what a name means, and fetch it where that is a repository of the hub.

    A `Path` never means a repository, nor does a string that is not `org/name` with or without `@revision`.

    Raises:
        FormatError: there is no such file or directory, nor such a repository; or it cannot be fetched, or holds
            nothing of the kind in a format that is read.
    """
    name, rules = str(name_or_path), RULES[kind]
    if name == BUILTIN and rules.builtin:
        return Location(rules.builtin, name)
    path = Path(name)
    if path.is_dir() or (kind == "dataset" and path.exists()):
        held = [other for other, file in CONFIGS.items() if (path / file).is_file()]
        if kind in CONFIGS and held and kind not in held:
            raise FormatError(f"{path}: holds {CONFIGS[held[0]]} and no {CONFIGS[kind]}; name it as the {held[0]}")
        if kind == "adapter" and not held and (path / "run.json").is_file():
            newest = max(path.glob("checkpoints/step-*"), default=None)
            found = f", or use its newest checkpoint, {newest}" if newest else "; it has no checkpoint yet"
            raise FormatError(f"{path}: is an unfinished run; repeat its finetune command to resume it{found}")
        return Location(path, name)
    if hub_id := _hub_id(name_or_path, kind):
        return _download(hub_id[1], hub_id[2], kind)
    raise FormatError(f"{path}: {rules.meaning}, 'org/name' or 'org/name@revision' of the hub")


def unpinned(name: str) -> tuple[str, str | None]:
    """The `name` of a `Location` as PEFT writes it: the repository and the commit, or a path and None."""
    found = PINNED.fullmatch(name)
    return (found[1], found[2]) if found else (name, None)


def with_revision(name: str, revision: str | None) -> str:
    """The name of a repository at a revision; a path has none and is left alone."""
    return f"{name}@{revision}" if revision and HUB_ID.fullmatch(name) else name


def _hub_id(name_or_path: str | Path, kind: Kind) -> re.Match[str] | None:
    """The repository and the revision, where a name can be that of a repository: a mistyped file is not looked for."""
    name = str(name_or_path)
    is_file = Path(name).exists() or (kind == "dataset" and name.endswith(DATA_ENDINGS))
    return None if is_file or isinstance(name_or_path, Path) or name == BUILTIN else HUB_ID.fullmatch(name)


def _download(repository: str, revision: str | None, kind: Kind) -> Location:
    import huggingface_hub  # here, so that only who names a repository waits for it

    rules = RULES[kind]
    what = f"{repository}@{revision}" if revision else repository
    try:
        directory = huggingface_hub.snapshot_download(
            repository,
            repo_type="dataset" if kind == "dataset" else "model",
            revision=revision,
            allow_patterns=[*rules.needed, *rules.others],
            ignore_patterns=NEVER,
            tqdm_class=_bar(),
        )
    except Exception as error:  # the hub's own, and those of the HTTP library that its version uses
        raise FormatError(f"{what}: no such directory, and no {kind} from the hub: {_reason(error)}") from error
    path = Path(directory)
    if not any(found for pattern in rules.needed for found in path.glob(pattern)):
        accepted = " or ".join(rules.needed)
        raise FormatError(f"{what}: the repository has no {accepted} at its top; other formats are not read")
    return Location(path, f"{repository}@{path.name}")


def _bar() -> type[Any]:
    """The hub's progress bar; without a terminal there is none."""
    from huggingface_hub.utils.tqdm import tqdm

    class Bar(tqdm):
        def __init__(self, *values: Any, **options: Any) -> None:
            super().__init__(*values, **{"disable": None, **options})

    return Bar


def _reason(error: Exception) -> str:
    """Why something could not be fetched, in one line."""
    from huggingface_hub import errors

    login = "log in (HF_TOKEN, or `hf auth login`)"
    reasons: list[tuple[type[Exception], str]] = [  # the first that fits: some are kinds of later ones
        (errors.GatedRepoError, f"it is gated; accept its terms on its page, and {login}"),
        (errors.RepositoryNotFoundError, f"there is no such repository; if it is private, {login}"),
        (errors.RevisionNotFoundError, "the repository has no such revision"),
        (
            errors.LocalEntryNotFoundError,
            f"it is not in the cache, and the hub cannot be reached ({_line(error.__cause__)})",
        ),
    ]
    if isinstance(error.__cause__, errors.OfflineModeIsEnabled):
        return "it is not in the cache, and HF_HUB_OFFLINE is set"
    return next((reason for kind, reason in reasons if isinstance(error, kind)), _line(error))


def _line(error: BaseException | None) -> str:
    """The first line of an error's text, or its kind."""
    return next(iter(str(error).splitlines()), type(error).__name__)
