"""A page of the package as a page of the site: docstrings and comments on the left, the code on the right."""

from __future__ import annotations

import ast
import functools
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGES = ("lora", "nf4", "llama", "adapter", "data", "training")
IS_EQUATION = re.compile(r" [=←~] ")
SYMBOLS = {
    "ᵀ": r"^\top ", "²": "^2", "⁻": "^{-}", "₀": "_0", "₁": "_1", "₂": "_2", "ᵢ": "_i", "ⱼ": "_j", "ₜ": "_t",
    "·": r"\cdot ", "×": r"\times ", "⊙": r"\odot ", "≤": r"\le ", "≥": r"\ge ", "≪": r"\ll ", "∈": r"\in ",
    "←": r"\leftarrow ", "→": r"\to ", "~": r"\sim ", "…": r"\dots ", "‖": r"\Vert ", "Σ": r"\sum ", "±": r"\pm ",
    "Δ": r"\Delta ", "α": r"\alpha ", "β": r"\beta ", "η": r"\eta ", "θ": r"\theta ", "λ": r"\lambda ", "π": r"\pi ",
    "σ": r"\sigma ", "ε": r"\varepsilon ", "′": "'", "%": r"\%", "#": r"\#",
}  # fmt: skip


class Part(NamedTuple):
    """Lines of code that belong together, and what is said of them."""

    code: str
    notes: str = ""
    name: str = ""  # of the function or class


def page(name: str) -> str:
    """Return a page as Markdown: its first paragraph, then one row for each part."""
    folder = ROOT / "minilora" if name in PAGES else ROOT
    source = (folder / f"{name}.py").read_text(encoding="utf-8")
    tree = ast.parse(source)
    title, _, rest = (ast.get_docstring(tree) or "").partition("\n")
    text = [f"# {name}.py", f"**{title}**", notes(rest)]
    for part in parts(source.splitlines(), tree.body[1:]):
        places = links(name, part.name) if name in PAGES else []
        left = "\n\n".join([notes(part.notes), *places]).strip() or "<!-- -->"
        right = "\n\n".join([f"```python\n{part.code}\n```", *kernel(name, part.name)])
        columns = f":::{{container}} notes\n{left}\n:::\n:::{{container}} code\n{right}\n:::"
        text.append(f"::::{{container}} row\n{columns}\n::::")
    return "\n\n".join(text) + "\n"


def parts(lines: list[str], body: list[ast.stmt], owner: str = "") -> Iterator[Part]:
    """Cut the statements of a module or a class into functions, classes, and the lines between them."""
    loose: list[str] = []
    for node in body:
        is_named = isinstance(node, ast.FunctionDef | ast.ClassDef)
        begin = min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", []))]) - 1
        first_comment = begin
        while lines[first_comment - 1].lstrip().startswith("#"):
            first_comment -= 1
        if not is_named:
            if not lines[first_comment - 1]:
                loose.append("")
            loose += lines[first_comment : node.end_lineno]
            continue
        if loose:
            yield Part("\n".join(loose).strip("\n"))
            loose = []
        comments = [line.strip("# -") for line in lines[first_comment:begin]]
        docstring = ast.get_docstring(node)
        first = node.body[0]
        head = lines[begin : first.lineno - 1]
        rest = lines[(first.end_lineno if docstring else first.lineno - 1) : node.end_lineno]
        is_class = isinstance(node, ast.ClassDef)
        code = "\n".join(head if is_class else [*head, *rest])
        yield Part(code, f"{docstring or ''}\n\n{chr(10).join(comments)}", owner + node.name)
        if is_class:
            yield from parts(lines, node.body[1:] if docstring else node.body, f"{node.name}.")
    if loose:
        yield Part("\n".join(loose).strip("\n"))


def notes(docstring: str) -> str:
    """Return a docstring as Markdown, with its equations as mathematics."""
    blocks = re.split(r"\n\s*\n", inspect.cleandoc(docstring))
    return "\n\n".join(_block(block) for block in blocks if block.strip())


def _block(block: str) -> str:
    lines = block.splitlines()
    if block.startswith(">>>"):
        return f"```python\n{block}\n```"
    if block.startswith(("Shapes:", "Raises:")):
        title, *rest = re.split(r"(?<=:)\s+", block, maxsplit=1)
        return f"*{title}* {' '.join(rest)}"
    if all(line.startswith("    ") for line in lines):
        if lines[0].endswith(":") or not any(IS_EQUATION.search(line) for line in lines):  # code, or a list
            return "\n".join(["```text", *(line[4:] for line in lines), "```"])
        rows = [re.split(r"\s{2,}", line.strip()) for line in lines]
        return "\n\n".join(
            " &ensp; ".join(f"${latex(cell)}$" if IS_EQUATION.search(cell) else cell for cell in row) for row in rows
        )
    if len(lines) == 1 and IS_EQUATION.search(block) and not block.endswith("."):
        equation, _, source = block.partition("  [")
        equations = [f"$${latex(each)}$$" for each in re.split(r"\s{2,}|(?<=,) (?=[a-z]+ )", equation)]
        return "\n\n".join([*equations, f"[{source}"] if source else equations)
    return re.sub(r"(?<!`)\*", r"\\*", block)


def latex(equation: str) -> str:
    """Translate an equation in Unicode into LaTeX."""
    equation = re.sub(r"√(\w+|\((?:[^()]|\([^()]*\))*\))", r"\\sqrt{\1}", equation)
    equation = re.sub(r"\^\(([^)]*)\)", r"^{\1}", equation)
    # LaTeX keeps no space, so those beside a word are written as one.
    equation = re.sub(r"(?<=[A-Za-z]{2}) (?=[\w|⌊])|(?<=[\w|\])⌉]) (?=[A-Za-z]{2})", r"\\ ", equation)
    word = re.compile(r"(?<!\\)\b(?![A-Za-z]_)[A-Za-z]\w+", re.ASCII)
    equation = word.sub(lambda found: rf"\mathrm{{{found[0]}}}".replace("_", r"\_"), equation)
    return "".join(SYMBOLS.get(character, character) for character in equation)


def links(page: str, name: str) -> list[str]:
    """Return links from a function to the chapter that builds it and the test that holds its law."""
    function = name.rpartition(".")[2]
    chapters = dict.fromkeys(sorted((ROOT / "tutorials").glob("*.md")), f"<!-- quoted: {page}.{name} -->")
    tests = {ROOT / "tests" / f"test_{file}.py": f"{function}(" for file in (page, "kernels")}
    places = {"built by hand": chapters, "its law": tests}
    found = []
    for title, texts in places.items():
        there = [path for path, text in texts.items() if name and path.exists() and text in path.read_text("utf-8")]
        found += [f"[{title}](../{there[0].relative_to(ROOT)})"] if there else []
    return [" · ".join(found)] if found else []


def kernel(page: str, name: str) -> list[str]:
    """Return the kernel of a definition, which a click shows."""
    if f"{page}.{name}" not in _kernels():
        return []
    path, code = _kernels()[f"{page}.{name}"]
    summary = "<details><summary>its kernel: the same, faster or leaner</summary>"
    return [summary, f"[{path}]({path})", f"```python\n{code}\n```", "</details>"]


@functools.cache
def _kernels() -> dict[str, tuple[str, str]]:
    """Find the kernel of each definition: its file, and its code."""
    found = {}
    for path in sorted((ROOT / "minilora" / "kernels").glob("*.py")):
        source = path.read_text(encoding="utf-8")
        for node in ast.parse(source).body:
            for decorator in getattr(node, "decorator_list", []):
                if isinstance(decorator, ast.Call) and decorator.keywords:
                    of = ast.unparse(decorator.keywords[0].value)
                    found[of] = f"kernels/{path.name}", ast.get_source_segment(source, node) or ""
    return found
