"""Write docs/api.md: every public name with its signature and its docstring.

python scripts/api.py
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path

import minilora as ml

PAGE = Path(__file__).parents[1] / "docs" / "api.md"
HEAD = """# API

All public names, as `import minilora as ml` has them. `python scripts/api.py` writes this page from the docstrings.
"""
PARTS = {
    "Models and tokenizers": """
        load_model save_model load_classifier load_tokenizer Tokenizer grow_vocabulary generate QuantizeConfig
    """,
    "Adapters": """
        LoraConfig find_target_modules attach detach delete_adapter load_adapter save_adapter hotswap_adapter
        set_adapter disable_adapter mixed_batch merge merged merged_if_faster
        combine_adapters CombineConfig count_parameters push_to_hub
    """,
    "Data and training": """
        load_dataset load_classes Dataset Example DataConfig train TrainConfig TrainResult Meter set_dropout_step
    """,
    "Kernels": "plain kernels",
    "Errors": "MiniloraError ConfigError DataError FormatError ShapeError TargetError TrainingError",
}


def page() -> str:
    """Return the text of docs/api.md.

    Raises:
        AssertionError: a public name is in no part, or a name of a part is not public.
    """
    names = [name for part in PARTS.values() for name in part.split()]
    assert sorted(names) == sorted(ml.__all__), set(names) ^ set(ml.__all__)
    return "\n".join([HEAD, *(line for title, part in PARTS.items() for line in section(title, part.split()))])


def section(title: str, names: list[str]) -> Iterator[str]:
    """Yield the lines of a part of the page."""
    yield f"## {title}\n"
    for name in names:
        about = [signature(name), inspect.getdoc(getattr(ml, name)) or ""]
        yield f"### `ml.{name}`\n\n```text\n" + "\n\n".join(filter(None, about)) + "\n```\n"


def signature(name: str) -> str:
    """Return how a function is called, or an empty string for an error; a data class has one field a line."""
    thing = getattr(ml, name)
    if isinstance(thing, type) and issubclass(thing, Exception):
        return ""
    found = inspect.signature(thing)
    lines = [parameter(each) for each in found.parameters.values()]
    text = f"ml.{name}({', '.join(lines)})"
    if len(text) > 100:
        text = f"ml.{name}(\n" + "".join(f"    {line},\n" for line in lines) + ")"
    result = found.return_annotation
    return text if isinstance(thing, type) or result is inspect.Signature.empty else f"{text} -> {result}"


def parameter(each: inspect.Parameter) -> str:
    """Return a parameter as it is written in code."""
    kind = "" if each.annotation is each.empty else f": {each.annotation}"
    return each.name + kind + ("" if each.default is each.empty else f" = {each.default!r}")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
