"""Write docs/api.md: every public name and method with its signature and its docstring.

python scripts/api.py
"""

import ast
import inspect
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import minilora as ml
from minilora import testing

PAGE = Path(__file__).parents[1] / "docs" / "api.md"
HEAD = """# API

All public names, as `import minilora as ml` has them, and those of `minilora.testing`. In versions 0.x names may
change from one minor version to the next; [the changelog](../CHANGELOG.md) says which. `python scripts/api.py` writes
this page from the docstrings.
"""
PARTS = {
    "Models and tokenizers": """
        load_model save_model load_tokenizer Tokenizer generate QuantizeConfig
    """,
    "Adapters": """
        LoraConfig find_target_modules attach detach delete_adapter load_adapter save_adapter
        set_adapter disable_adapter merge merged
        combine_adapters count_parameters
    """,
    "Data and training": """
        load_dataset Dataset Example DataConfig train TrainConfig TrainResult ProgressBar Tracker
    """,
    "Kernels": "plain",
    "Errors": "MiniloraError ConfigError DataError FormatError ShapeError TargetError TrainingError",
}


OF_TESTING = sorted(name for name, thing in vars(testing).items() if name[0] != "_" and not inspect.ismodule(thing))
CHECKS = [name for name in OF_TESTING if name.islower()]
CLASSES = [name for name in OF_TESTING if not name.islower()]


def page() -> str:
    """Return the text of docs/api.md.

    Raises:
        AssertionError: a public name is in no part, or a name of a part is not public.
    """
    names = [name for part in PARTS.values() for name in part.split()]
    assert sorted(names) == sorted(ml.__all__), set(names) ^ set(ml.__all__)
    parts = [line for title, part in PARTS.items() for line in section(title, ml, "ml", part.split())]
    parts += [*section("Checks", testing, "testing", CHECKS), "## Failures, reports and cases of checks\n"]
    parts += [entry(f"### `testing.{name}`", f"testing.{name}", getattr(testing, name)) for name in CLASSES]
    return "\n".join([HEAD, *parts])


def section(title: str, module: ModuleType, prefix: str, names: list[str]) -> Iterator[str]:
    """Yield the lines of a part of the page."""
    yield f"## {title}\n"
    for name in names:
        thing = getattr(module, name)
        yield entry(f"### `{prefix}.{name}`", f"{prefix}.{name}", thing)
        for method, function in vars(thing).items() if inspect.isclass(thing) else ():
            if inspect.isfunction(function) and not method.startswith("_"):
                yield entry(f"#### `{name}.{method}`", method, function)


def entry(heading: str, name: str, thing: Any) -> str:
    """Return a heading, and below it the signature and the docstring."""
    about = [signature(name, thing), inspect.getdoc(thing) or ""]
    return f"{heading}\n\n```text\n" + "\n\n".join(filter(None, about)) + "\n```\n"


def signature(name: str, thing: Any) -> str:
    """Return how a function is called, or an empty string for an error; a data class has one field a line."""
    if isinstance(thing, type) and issubclass(thing, Exception):
        return ""
    types = annotations(thing)
    lines = [parameter(each, types) for each in inspect.signature(thing).parameters.values() if each.name != "self"]
    text = f"{name}({', '.join(lines)})"
    if len(text) > 100:
        text = f"{name}(\n" + "".join(f"    {line},\n" for line in lines) + ")"
    return text if isinstance(thing, type) or "return" not in types else f"{text} -> {types['return']}"


def annotations(thing: Any) -> dict[str, str]:
    """Return the annotations of a function, or of a class's fields and constructor, as the source has them."""
    node: Any = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(thing)))).body[0]
    if isinstance(thing, type):
        fields = {each.target.id: ast.unparse(each.annotation) for each in node.body if isinstance(each, ast.AnnAssign)}
        return fields or annotations(thing.__init__)
    written = {each.arg: each.annotation for each in ast.walk(node.args) if isinstance(each, ast.arg)}
    written["return"] = node.returns
    return {name: ast.unparse(each).strip("'") for name, each in written.items() if each}


def parameter(each: inspect.Parameter, types: dict[str, str]) -> str:
    """Return a parameter as it is written in code."""
    kind = f": {types[each.name]}" if each.name in types else ""
    star = {each.VAR_POSITIONAL: "*", each.VAR_KEYWORD: "**"}.get(each.kind, "")
    return star + each.name + kind + ("" if each.default is each.empty else f" = {each.default!r}")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
