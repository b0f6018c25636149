"""The recipes as a folder: short files on public names and the pages, each in the table, each with a test."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
RECIPES = {path.stem: path for path in sorted((ROOT / "recipes").glob("*.py"))}
PAGES = {"lora", "nf4", "llama", "adapter", "data", "training"}
TABLE = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")


def test_a_recipe_has_at_most_a_hundred_lines_and_the_table_says_how_many():
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in RECIPES.items()}
    rows = re.findall(r"^\| \[`(\w+)\.py`\]\(\1\.py\) \|.*?\| (\d+) \|[^|]*\|$", TABLE, flags=re.MULTILINE)
    assert {name: int(lines) for name, lines in rows} == lengths
    assert not {name: length for name, length in lengths.items() if length > 100}


def test_a_recipe_imports_public_names_and_the_pages_alone():
    for name, path in RECIPES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                package, _, page = (node.module or "").partition(".")
                assert package != "minilora" or page in PAGES, f"{name}: {ast.unparse(node)}"
            elif isinstance(node, ast.Import):
                assert not [each for each in node.names if each.name.startswith("minilora.")], name


def test_every_recipe_is_run_by_a_test():
    assert {path.stem.removeprefix("test_") for path in (ROOT / "tests" / "recipes").glob("test_*.py")} == {*RECIPES}
