"""How an adapter was trained, as far as the files beside it tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minilora.cli.command import Options
from minilora.errors import FormatError
from minilora.models.hub import fetch
from minilora.storage import read_json, read_text


@dataclass(frozen=True)
class Training:
    """How an adapter was trained, as far as the files beside it tell; it wants to be asked in the same way.

    `template` is its chat template; with `is_plain` its rows were no conversations; `config` is that of `run.json`.
    """

    template: str | None
    is_plain: bool
    config: Mapping[str, Any]


def how_trained(names: Sequence[str | Path]) -> Training:
    """What lies beside adapters, or a model: directories, or adapters' names. The first that has a file tells.

    Raises:
        FormatError: there is no such adapter, or a file is not what its name says.
    """
    paths = [name if isinstance(name, Path) else fetch(name, "adapter") for name in names]

    def first(name: str) -> Path | None:
        return next((path / name for path in paths if (path / name).is_file()), None)

    template, run = first("chat_template.jinja"), first("run.json")
    values = read_json(run) if run else {}
    config = values.get("config", {})
    if not isinstance(config, dict) or not isinstance(config.get("system"), str | None):
        raise FormatError(f"{run}: config: found {config!r:.60}, need an object, and text as its 'system'")
    return Training(read_text(template) if template else None, values.get("prompts") == "plain", config)


def adapters(options: Options) -> list[str]:
    """--adapter, whether it may be given once or often."""
    given = options["adapter"]
    return given if isinstance(given, list) else [] if given is None else [given]
