"""The project as a whole: who may import whom, what the README says of the tree, and what must never appear."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import minilora

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "minilora"
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODULES = {path.relative_to(PACKAGE).with_suffix("").as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
CORE = (
    *("adapters/functional", "adapters/layers", "adapters/attach", "quant/nf4", "quant/linear"),
    *("models/ops", "models/attention", "models/llama", "runs/loop"),
)

# part -> what it may import of minilora, besides `errors` and `definition`. The first row that fits a module holds.
BELOW = (
    "storage",
    "tiles",
    "quant/",
    "models/",
    "adapters/",
    "runs/",
    "tools/",
    "cli/",
)  # each imports those before it
MAY_IMPORT = {
    "errors": (),
    "storage": (),
    "tiles": (),
    "testing/reference": (),
    "testing/": ("testing/",),
    "__main__": ("cli",),
    "public": BELOW[:-1],
    "__init__": (),
    **{part: BELOW[: i + 1] for i, part in enumerate(BELOW)},
}


def imported(path):
    """The modules that a file imports when it runs; what stands under TYPE_CHECKING does not."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and id(node) not in typing_only:
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import) and id(node) not in typing_only:
            yield from (alias.name for alias in node.names)


def of_minilora(path):
    names = {
        name.removeprefix("minilora.").replace(".", "/") for name in imported(path) if name.startswith("minilora.")
    }
    return {name for name in names if name in MODULES}


@pytest.mark.parametrize("module", [name for name, path in MODULES.items() if path.stat().st_size])
def test_a_part_imports_only_what_the_design_allows(module):
    allowed = next(allowed for part, allowed in MAY_IMPORT.items() if module.startswith(part))
    wrong = {name for name in of_minilora(MODULES[module]) if name != "errors" and not name.startswith(tuple(allowed))}
    assert not wrong, f"minilora/{module}.py imports {sorted(wrong)}"


@pytest.mark.parametrize("module", ["testing/reference", "testing/reference_nf4"])
def test_the_oracles_import_numpy_alone(module):
    names = {name.split(".")[0] for name in imported(MODULES[module])}
    assert names <= {"__future__", "collections", "typing", "math", "numpy"}


def test_nothing_imports_a_peer():
    peers = {"transformers", "peft", "bitsandbytes", "trl", "accelerate"}
    assert not {name for path in MODULES.values() for name in imported(path) if name.split(".")[0] in peers}


def test_nothing_is_pickled_evaluated_or_run_by_a_shell():
    forbidden = re.compile(r"\bpickle\b|torch\.load\b|(?<![.\w])(?:eval|exec)\(|yaml\.load|shell=True|os\.system")
    for module, path in MODULES.items():
        assert not forbidden.search(path.read_text(encoding="utf-8").replace("Nothing is pickled", "")), module


def test_the_page_of_architecture_names_every_file_of_the_package_and_no_other():
    tree = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split("```")[1]
    named, folder = set(), ""
    for indent, name in re.findall(r"^( *)(\w+(?:/|\.py)) +\S", tree, flags=re.MULTILINE):
        folder = "" if len(indent) <= 2 else folder
        if name.endswith("/"):
            folder = name
        else:
            named.add(folder + name)
    assert named == {f"{name}.py" for name, path in MODULES.items() if path.stat().st_size}


def test_the_readme_counts_the_core_path():
    lines = sum(len(MODULES[name].read_text(encoding="utf-8").splitlines()) for name in CORE)
    stated = int(re.search(r"about ([\d,]+) lines", README)[1].replace(",", ""))
    assert abs(stated - lines) <= 50, f"the core path has {lines} lines"
    assert all(f"`{name}`" in README for name in CORE)


def test_using_minilora_imports_no_template_engine_no_tokenizer_and_no_command_line():
    needless = ("jinja2", "tokenizers", "minilora.cli")
    command = f"import sys, minilora; minilora.train; sys.exit(sum(name in sys.modules for name in {needless}))"
    assert subprocess.run([sys.executable, "-c", command], check=False).returncode == 0


def test_the_public_names_are_sorted_and_there():
    assert list(minilora.__all__) == sorted(minilora.__all__)
    assert all(hasattr(minilora, name) for name in minilora.__all__)


def test_no_file_is_longer_than_the_guide():
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()}
    assert not {name: length for name, length in lengths.items() if length > 350}
