"""The project as a whole: who may import whom, what its pages say of its files, and what must never appear."""

import ast
import graphlib
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "minilora"
MODULES = {path.relative_to(PACKAGE).with_suffix("").as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
PAGES = ("nf4", "lora", "llama", "adapter", "data", "training")  # the order in which they may import each other
PAGES_LINES, PAGES_COLUMNS = 1450, 100  # of all six, at most
ROOMS = ("models/", "adapters/", "runs/", "tools/", "cli/")  # likewise

# part, a folder or file -> the parts that it may import besides itself and those of `COMMON`
COMMON = ("errors", "definition", "options")
MAY_IMPORT = {
    **dict.fromkeys((*COMMON, "files", "testing/", "__init__"), ()),
    **{page: PAGES[:i] for i, page in enumerate(PAGES)},
    "kernels/": PAGES,  # which only `public` and `runs/memory` import
    "kernels/delta_rule": (*PAGES, "models/"),  # where its definition is
    "runs/memory": ("files", *PAGES, "kernels/", *ROOMS[:3]),  # counts what kernels keep
    **{room: ("files", *PAGES, *ROOMS[:i]) for i, room in enumerate(ROOMS)},
    "cli/selftest": ("files", *PAGES, *ROOMS[:3], "testing/"),
    "public": (*PAGES, *ROOMS[:-1], "kernels/"),
    "__main__": ("cli/",),
}
FIRST_IMPORTS = """
import importlib, json, sys
for module in json.loads(sys.argv[1]):
    for name in [name for name in sys.modules if name.partition(".")[0] == "minilora"]:
        del sys.modules[name]
    try:
        importlib.import_module(module)
    except ImportError as error:
        print(module, error)
"""


@cache
def imported(path):
    """The modules that a file imports when it runs; what stands under TYPE_CHECKING does not."""
    names = []
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and id(node) not in typing_only:
            names += [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import) and id(node) not in typing_only:
            names += [alias.name for alias in node.names]
    return names


def of_minilora(module):
    """The modules of minilora that one of them imports."""
    names = {name.removeprefix("minilora.").replace(".", "/") for name in imported(MODULES[module])}
    return {found for name in names for found in (name, f"{name}/__init__") if found in MODULES} - {module}


def part_of(module):
    folder, slash, _ = module.partition("/")
    return folder + slash


def test_a_part_imports_only_what_the_design_allows():
    for module in MODULES:
        part = part_of(module)
        allowed = {part, *COMMON, *MAY_IMPORT.get(module, MAY_IMPORT[part])}
        assert not {name for name in of_minilora(module) if part_of(name) not in allowed}, module


def test_no_module_imports_itself_by_way_of_others():
    graphlib.TopologicalSorter({module: of_minilora(module) for module in MODULES}).prepare()  # CycleError names them


@pytest.mark.long
def test_every_module_can_be_the_first_that_is_imported():
    names = [f"minilora.{module}".replace("/", ".").removesuffix(".__init__") for module in MODULES]
    names.remove("minilora.__main__")  # which runs
    command = [sys.executable, "-c", FIRST_IMPORTS, json.dumps(names)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert run.stdout == ""


def test_nothing_imports_a_peer_and_the_oracles_import_numpy_alone():
    peers = {"transformers", "peft", "bitsandbytes", "trl", "accelerate"}
    assert not {name for path in MODULES.values() for name in imported(path) if name.split(".")[0] in peers}
    for oracle in (MODULES["testing/reference"], ROOT / "tests" / "reference_model.py"):
        names = {name.split(".")[0] for name in imported(oracle)}
        assert names <= {"__future__", "collections", "typing", "math", "statistics", "numpy"}, oracle


def tree(page):
    """The paths below minilora/ in the tree of a page, and its folders at the top."""
    block = page.partition("\nminilora/")[2].partition("```")[0]
    folders, found = ["minilora/"], []
    for indent, name in re.findall(r"^( *)([\w.]+/?) +\S", block, flags=re.MULTILINE):
        folders[len(indent) // 2 :] = [name]
        found.append("".join(folders))
    return found


def test_the_page_of_architecture_names_every_file_and_no_other():
    named = tree((ROOT / "docs" / "internals" / "architecture.md").read_text(encoding="utf-8"))
    written = {f"minilora/{name}.py" for name, path in MODULES.items() if path.stat().st_size}
    assert sorted(name for name in named if name.endswith(".py")) == sorted(written)
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert {name for name in named if name.endswith("/")} == {f"minilora/{name}/" for name in folders}


def test_the_six_pages_and_each_family_keep_to_their_numbers_of_lines():
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()}
    assert sum(lengths[page] for page in PAGES) <= PAGES_LINES
    pages = "".join(MODULES[page].read_text(encoding="utf-8") for page in PAGES)
    assert max(map(len, pages.splitlines())) <= PAGES_COLUMNS
    families = {name for name, path in MODULES.items() if " = Family(" in path.read_text(encoding="utf-8")}
    assert not {name: lengths[name] for name in families - {"models/config"} if lengths[name] > 90}
