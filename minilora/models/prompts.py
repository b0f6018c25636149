"""The record of how a model is asked for an answer, besides the chat template.

    minilora-prompts.json    {"form": "template", "system": "Be brief.", "thinking": false}

The file is in the directory of the tokenizer or of an adapter, and is copied wherever the chat template is.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from minilora.errors import FormatError
from minilora.files import parse_object, read_text

PROMPTS_FILE = "minilora-prompts.json"
PROMPT_FILES = ("chat_template.jinja", PROMPTS_FILE)
FORMS = ("template", "plain")
REASONING = ("reasoning_content", "thinking", "reasoning")  # the names that a message's reasoning is passed under


@dataclass(frozen=True)
class Prompts:
    """The prompts that a model was trained on."""

    form: str = "template"  # conversations, written by the chat template; or "plain" text
    system: str | None = None  # the system prompt of conversations that give none
    thinking: bool | None = None  # had the answers thoughts? None: some, or the template asks in one way for both

    @classmethod
    def parse(cls, text: str, where: str) -> "Prompts":
        """Return the prompts that a file's text describes."""
        values = parse_object(text, where)
        prompts = cls(**values) if values.keys() <= {"form", "system", "thinking"} else cls("")
        is_typed = isinstance(prompts.system, str | None) and isinstance(prompts.thinking, bool | None)
        if prompts.form not in FORMS or not is_typed:
            need = f"`form`, one of {FORMS}, perhaps `system`, text, and `thinking`, true or false"
            raise FormatError(f"{where}: found {values!r:.80}, need {need}")
        return prompts


def read_prompt_files(*directories: Path) -> dict[str, str]:
    """Return the texts of `PROMPT_FILES` in directories, each of the first that has it; an empty one is none."""
    texts: dict[str, str] = {}
    for path in [directory / name for directory in directories for name in PROMPT_FILES]:
        if path.name not in texts and path.exists() and (text := read_text(path)):
            texts[path.name] = text
            if path.name == PROMPTS_FILE:
                Prompts.parse(text, str(path))
    return texts


def read_prompts(*directories: Path) -> Prompts:
    """Return the prompts of the first of the directories that records them."""
    return Prompts.parse(read_prompt_files(*directories).get(PROMPTS_FILE, "{}"), PROMPTS_FILE)


def copy_prompt_files(sources: Iterable[Path], out: Path) -> None:
    """Write `PROMPT_FILES` of directories, each of the first that has it, to another one."""
    for name, text in read_prompt_files(*sources).items():
        (out / name).write_text(text, encoding="utf-8")
