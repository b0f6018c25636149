"""How a model is asked for an answer: what its files say, besides the chat template.

    minilora-prompts.json    {"form": "template", "system": "Be brief."}

The file lies beside the tokenizer's, or an adapter's, and goes wherever the chat template goes.
"""

from __future__ import annotations

import json
from collections import ChainMap
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from minilora.errors import FormatError
from minilora.files import parse_object, read_json, read_text

PROMPTS_FILE = "minilora-prompts.json"
PROMPT_FILES = ("chat_template.jinja", PROMPTS_FILE)
FORMS = ("template", "plain")
REASONING = ("reasoning_content", "thinking", "reasoning")  # the names that a message's reasoning is passed under


@dataclass(frozen=True)
class Prompts:
    """The prompts that a model was trained on.

    Attributes:
        form: "template" if they were conversations, written by the chat template, or "plain" text.
        system: the system prompt of conversations that have none.
    """

    form: str = "template"
    system: str | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def parse(cls, text: str, where: str) -> Prompts:
        """Return the prompts that a file's text describes."""
        values = parse_object(text, where)
        found = cls(**values) if values.keys() <= {"form", "system"} else cls("")
        if found.form not in FORMS or not isinstance(found.system, str | None):
            raise FormatError(f"{where}: found {values!r:.80}, need `form`, one of {FORMS}, and `system`, text or null")
        return found


def read_prompt_files(*directories: Path) -> dict[str, str]:
    """Return the texts of `PROMPT_FILES` in directories, each of the first that has it."""
    return dict(ChainMap(*map(_read_one, directories)))


def read_prompts(*directories: Path) -> Prompts:
    """Return the prompts of the first of the directories that records them."""
    return Prompts.parse(read_prompt_files(*directories).get(PROMPTS_FILE, "{}"), PROMPTS_FILE)


def copy_prompt_files(sources: Iterable[Path], out: Path) -> None:
    """Write `PROMPT_FILES` of directories, each of the first that has it, to another one."""
    for name, text in read_prompt_files(*sources).items():
        (out / name).write_text(text, encoding="utf-8")


def _read_one(directory: Path) -> dict[str, str]:
    paths = [directory / name for name in PROMPT_FILES]
    texts = {path.name: text for path in paths if path.exists() and (text := read_text(path))}  # an empty one is none
    where, run = directory / PROMPTS_FILE, directory / "run.json"
    if PROMPTS_FILE not in texts and run.exists():  # a run of version 0.2 recorded its prompts there
        where, values = run, read_json(run)
        if isinstance(config := values.get("config", {}), dict):
            form = "plain" if values.get("prompts") == "plain" else "template"
            texts[PROMPTS_FILE] = json.dumps({"form": form, "system": config.get("system")}, indent=2)
    if PROMPTS_FILE in texts:
        Prompts.parse(texts[PROMPTS_FILE], str(where))
    return texts
