"""Run the cells of the chapters, and write what they print and draw into them.

    python tutorials/run.py [NN ...]             run these chapters, or all quick ones, and write their outputs
    python tutorials/run.py --check [NN ...]     run them, several at a time, change nothing, and fail if an output
                                                 would be another
    python tutorials/run.py --notebooks [NN ...] run them as notebooks, written beside them, with their solution folded
                                                 and without it (extra `notebooks`)

A chapter is Markdown, and its cells are its `python` and `sh` fences: they run from top to bottom, Python in one
namespace, in a fresh directory in which `tutorials`, `scripts`, `recipes`, `nanolora.py` and `smollm2` are this
checkout's. What a cell prints stands in a `text` fence below it, or below the fold that it ends. The figures that it
leaves open go to the images that follow it, in their order.

Outputs must be equal, but for numbers with a decimal point, which may differ by one in a thousand. Other rules for a
cell stand in a comment above it: `<!-- tol=0.05 -->` is the relative tolerance of all its numbers, whole ones too;
`<!-- unchecked -->` shows its output without comparing it; `predict` at the end lets the site fold the output, below a
question that the reader answers first. Times, speeds and memory (numbers before s, ms, min,
tokens/s, kB, MB, GB) are never compared. `<!-- slow -->` at the head of a chapter keeps it out of the default suite.

A `py` fence below `<!-- quoted: lora.lora_linear -->` shows the definition of that name in `minilora/lora.py`, without
its docstring. It is not a cell: it is written from the source, and must equal it.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import inspect
import io
import json
import math
import os
import re
import shlex
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))  # of nanolora.py
CELL = re.compile(
    r"^(?:<!-- (?P<options>[^\n]*) -->\n)?(?P<fence>```(?P<language>python|sh)\n(?P<code>.*?)^```\n)"
    r"(?:(?P<between>\n(?:</details>\n\n)?)```text\n(?P<output>.*?)^```\n)?",
    re.MULTILINE | re.DOTALL,
)
QUOTATION = re.compile(
    r"(?P<head>^<!-- quoted: (?P<name>[\w.]+) -->\n```py\n)(?P<code>.*?)^```\n", re.MULTILINE | re.DOTALL
)
IMAGE = re.compile(r"^!\[(?P<alt>[^\]]*)\]\((?P<path>[^)]*)\)", re.MULTILINE)
COST = re.compile(r"^\*(?:Reads in .*|Not run yet\.)\*$", re.MULTILINE)
FOLDED = re.compile(
    r"<details><summary>(.*?)</summary>\n(.*?)</details>\n(?:\n```text\n.*?^```\n)?", re.MULTILINE | re.DOTALL
)
UNREAD = re.compile(r"(?<=\])\([^)]*\)|!\[[^\]]*\]|<!--.*?-->|<[^>]*>", re.DOTALL)  # links, alt texts, tags
FORMULA = re.compile(r"(?<!\$)\$[^$]+\$(?!\$)")
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
CLOCK = re.compile(r"\d[\d,.]*(?= (?:s|ms|min|tokens/s|kB|MB|GB)\b)")
SETUP = """\
# The cells need minilora, installed from a checkout. They run in a fresh directory, in which `tutorials` is that of
# the checkout.
import importlib.util
import os
import runpy
import sys
import tempfile
from pathlib import Path

found = importlib.util.find_spec("minilora")
runner = Path(found.origin).parents[1] / "tutorials" / "run.py" if found else None
if runner is None or not runner.is_file():
    raise SystemExit("In a checkout of minilora: pip install -e '.[plot,notebooks]'. Then restart the kernel.")
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
os.chdir(tempfile.mkdtemp())
runpy.run_path(str(runner))["link_checkout"]()
"""
SETUP_SMOLLM2 = """\
if not Path("smollm2").exists():
    print("This chapter needs SmolLM2: in the checkout, pip install -e '.[parity]', then")
    print("python scripts/pretrained.py smollm2 smollm2")
"""
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "minilora",  # with this and without a date, the bytes depend on the numbers and on matplotlib alone
    "svg.fonttype": "none",
    "savefig.bbox": "tight",
    "figure.figsize": (6.4, 3.0),
    "figure.facecolor": "white",  # to be read on a dark page too
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": "cycler('color', ['0072B2', 'D55E00', '009E73', 'CC79A7', '56B4E9', 'E69F00'])",
}


@dataclass
class Chapter:
    """A chapter that runs: its text as it becomes, and what has changed against the old one."""

    path: Path
    check: bool
    text: str = ""
    differences: list[str] = field(default_factory=list)

    def run(self) -> None:
        """Run all cells; unless this is a check, write the outputs."""
        old, began, position = self.path.read_text("utf-8"), time.monotonic(), 0
        cells = list(CELL.finditer(old))
        namespace: dict[str, Any] = {"__name__": "__main__"}
        for cell, end in zip(cells, [*(cell.start() for cell in cells), len(old)][1:], strict=True):
            line = old.count("\n", 0, cell.start("code")) + 1
            if cell["language"] == "python":
                output = run_python(cell["code"], str(self.path), line, namespace)
            else:
                output = run_shell(cell["code"])
            self.compare(cell["output"] or "", output, cell["options"], f"line {line}: the output")
            self.draw([image["path"] for image in IMAGE.finditer(old, cell.end(), end)], cell["options"], line)
            between = cell["between"] or "\n"
            shown = f"{between}```text\n{output}```\n" if output else between.removesuffix("\n")
            self.text += old[position : cell.end("fence")] + shown
            position = cell.end()
        self.text += old[position:]
        for quotation in QUOTATION.finditer(old):
            if quotation["code"] != (code := source(quotation["name"])):
                self.differences.append(f"{self.path.name}: {quotation['name']} is now\n{code}")
        self.text = QUOTATION.sub(lambda quotation: f"{quotation['head']}{source(quotation['name'])}```\n", self.text)
        if not self.check:
            minutes, seconds = reading_minutes(self.text), time.monotonic() - began
            cost = f"*Reads in {minutes} min, runs in {seconds:.0f} s on 2 CPU cores.*"
            self.path.write_text(COST.sub(cost, self.text), "utf-8", newline="\n")

    def draw(self, images: list[str], options: str | None, line: int) -> None:
        """Give the open figures to the images of the page, and close them."""
        figures = open_figures()
        if len(figures) != len(images):
            raise SystemExit(f"{self.path}:{line}: {len(figures)} figures are open, and {len(images)} images follow")
        for figure, image in zip(figures, images, strict=True):
            path, data = self.path.parent / image, plotted(figure)
            self.compare(stored(path), data, options, f"{image}: the data")
            if not self.check:
                path.parent.mkdir(exist_ok=True)
                figure.savefig(path, metadata={"Date": None, "Description": data})

    def compare(self, old: str, new: str, options: str | None, what: str) -> None:
        """Note a difference, unless the cell's options allow it."""
        stated = re.search(r"\btol=(\S+)", options or "")
        if "unchecked" not in (options or "") and not same(old, new, float(stated[1]) if stated else None):
            self.differences.append(f"{self.path.name}: {what} was\n{old}\nand is\n{new}")


def run_python(code: str, path: str, line: int, namespace: dict[str, Any]) -> str:
    """What the code prints. A traceback names the line of the chapter."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile("\n" * (line - 1) + code, path, "exec"), namespace)
    return printed.getvalue()


def run_shell(code: str) -> str:
    """What the commands print on standard output; `python` and `minilora` are those of this interpreter."""
    python = shlex.quote(sys.executable)
    names = f'python() {{ {python} "$@"; }}; minilora() {{ {python} -m minilora "$@"; }}\n'
    command = ["bash", "-euo", "pipefail", "-c", names + code]
    environment = {**os.environ, "COLUMNS": "80"}
    return subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8", check=True, env=environment).stdout


def source(name: str) -> str:
    """The lines of a definition, of `lora.lora_linear` or `nanolora.linear` for instance, without its docstring."""
    module, *path = name.split(".")
    definition: Any = importlib.import_module(module if module == "nanolora" else f"minilora.{module}")
    for part in path:
        definition = getattr(definition, part)
    lines = textwrap.dedent(inspect.getsource(definition)).splitlines(keepends=True)
    (node,) = ast.parse("".join(lines)).body
    assert isinstance(node, ast.FunctionDef | ast.ClassDef)
    if ast.get_docstring(node) is not None:
        del lines[node.body[0].lineno - 1 : node.body[0].end_lineno]
    return "".join(lines)


def open_figures() -> list[Figure]:
    """The figures that pyplot holds, which it then forgets."""
    if "matplotlib.pyplot" not in sys.modules:
        return []
    from matplotlib import pyplot

    figures = [pyplot.figure(number) for number in pyplot.get_fignums()]
    pyplot.close("all")
    return figures


def plotted(figure: Figure) -> str:
    """The numbers of a figure as JSON: vertices of lines and patches, offsets of markers, pixels of images."""
    arrays: list[Any] = []
    for axes in figure.axes:
        arrays += [line.get_xydata() for line in axes.lines]
        arrays += [patch.get_path().transformed(patch.get_patch_transform()).vertices for patch in axes.patches]
        arrays += [collection.get_offsets() for collection in axes.collections]
        arrays += [image.get_array() for image in axes.images]
    return json.dumps([[float(f"{number:.6g}") for number in array.ravel().tolist()] for array in arrays])


def stored(figure: Path) -> str:
    """The numbers that `draw` has put into the metadata of an SVG; "" if there is no such file."""
    found = re.search(r"<dc:description>(.*?)<", figure.read_text("utf-8") if figure.is_file() else "", re.DOTALL)
    return found[1] if found else ""


def same(old: str, new: str, tolerance: float | None = None) -> bool:
    """Are two outputs the same text, with the same numbers within the tolerance?"""
    old, new = (" ".join(CLOCK.sub("#", text).split()) for text in (old, new))
    pairs = list(zip(NUMBER.findall(old), NUMBER.findall(new), strict=False))
    return NUMBER.split(old) == NUMBER.split(new) and all(_close(*pair, tolerance) for pair in pairs)


def _close(old: str, new: str, tolerance: float | None) -> bool:
    if tolerance is None and not {".", "e"} & {*old, *new}:
        return old == new
    a, b = (float(text.replace(",", "")) for text in (old, new))
    return math.isclose(a, b, rel_tol=0.001 if tolerance is None else tolerance)


def reading_minutes(text: str) -> int:
    """At 120 words a minute, and a minute for each piece of code; without what is folded, and without exercises.

    A formula in a line counts as one word.
    """
    text = FOLDED.sub("", text.partition("\n## Exercise")[0])
    pieces = len(CELL.findall(text)) + len(QUOTATION.findall(text))
    prose = UNREAD.sub("", QUOTATION.sub("", CELL.sub("", text)))
    return math.ceil(len(FORMULA.sub(" x ", prose).split()) / 120 + pieces)


def write_notebooks(chapter: Path, directory: Path) -> list[Path]:
    """Run a chapter as a notebook, and write it, with its solution and without it; return the files.

    What `<details>` folds in the page is folded in the notebook, and tagged with its title.
    """
    import nbclient
    from nbformat import write

    notebook = make_notebook(chapter)
    nbclient.NotebookClient(notebook, timeout=None).execute()
    paths = [directory / f"{chapter.stem}.ipynb"]
    write(notebook, paths[0])
    if remove_solution(notebook):
        paths.append(directory / f"{chapter.stem}_without_solution.ipynb")
        write(notebook, paths[1])
    return paths


def make_notebook(chapter: Path) -> Any:
    """A chapter as a notebook that has not run yet."""
    from nbformat import v4

    page = chapter.read_text("utf-8")
    setup = SETUP + (SETUP_SMOLLM2 if '"smollm2"' in page else "")
    parts = FOLDED.split(IMAGE.sub("", page))
    cells = [*notebook_cells(f"```python\n{setup}```\n", [], is_folded=True), *notebook_cells(parts[0], [])]
    for title, folded, text in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        tags = [title.lower().replace(",", "")]  # a comma separates tags
        if CELL.search(folded):
            cells += notebook_cells(f"*{title}*", tags)
            cells += notebook_cells(folded, tags, is_folded=True)
        else:  # a hint or a prediction, which the Markdown of a notebook folds by itself
            cells += notebook_cells(f"<details><summary>{title}</summary>\n{folded}</details>\n", tags)
        cells += notebook_cells(text, [])
    for number, cell in enumerate(cells):
        cell.id = f"cell-{number}"  # the same in every build
    return v4.new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})


def remove_solution(notebook: Any) -> bool:
    """Take the cells of the solution out; return whether there were any."""
    count = len(notebook.cells)
    notebook.cells = [cell for cell in notebook.cells if "solution" not in cell.metadata.tags]
    return len(notebook.cells) < count


def notebook_cells(text: str, tags: list[str], is_folded: bool = False) -> Iterator[Any]:
    """Yield the cells of a text, Markdown and code by turns; commands follow the magic `%%bash`."""
    from nbformat import v4

    folding: dict[str, Any] = {"jupyter": {"source_hidden": True}, "tags": [*tags, "hide-input"]}
    metadata = folding if is_folded else {"tags": tags}
    position = 0
    for cell in CELL.finditer(text):
        if prose := text[position : cell.start()].strip():
            yield v4.new_markdown_cell(prose, metadata=metadata)
        magic = "%%bash\n" if cell["language"] == "sh" else ""
        yield v4.new_code_cell(magic + cell["code"].strip(), metadata=metadata)
        position = cell.end()
    if prose := text[position:].strip():
        yield v4.new_markdown_cell(prose, metadata=metadata)


@contextlib.contextmanager
def workplace() -> Iterator[None]:
    """A fresh directory that looks like the checkout; what cells write there is gone afterwards."""
    with tempfile.TemporaryDirectory() as directory, contextlib.chdir(directory):
        link_checkout()
        yield


def link_checkout() -> None:
    """Make the working directory look like the checkout."""
    root = HERE.parent
    links = {name: root / name for name in ("tutorials", "scripts", "recipes", "nanolora.py")}
    for model in (root / ".cache" / "pretrained" / "smollm2", root / "smollm2"):
        if model.is_dir():
            links["smollm2"] = model
    for name, target in links.items():
        Path(name).symlink_to(target)


def run_each(names: list[str], check: bool) -> bool:
    """Run chapters, each in a process of its own, which starts as if it were the first; return whether any failed.

    Checks run side by side, one a core. Chapters that are written run alone, for the time that each takes is written.
    """
    command = [sys.executable, __file__, *(flag for flag in sys.argv[1:] if flag.startswith("--"))]
    environment = {"OMP_NUM_THREADS": "1", **os.environ} if check else None

    def run(name: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, name], capture_output=True, encoding="utf-8", check=False, env=environment)

    has_failed = False
    with ThreadPoolExecutor(os.cpu_count() if check else 1) as pool:
        for done in pool.map(run, names):
            print(done.stdout, end="", flush=True)
            print(done.stderr, end="", file=sys.stderr, flush=True)
            has_failed |= done.returncode != 0  # negative where a signal ended it
    return has_failed


def main() -> None:
    """Run or check the chapters that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = "01, 02, … or the first word of a page; by default all that are not slow"
    parser.add_argument("chapters", nargs="*", metavar="NN", help=names)
    parser.add_argument("--check", action="store_true", help="fail where an output would change, and change nothing")
    parser.add_argument("--notebooks", action="store_true", help="write notebooks with their outputs")
    arguments = parser.parse_args()
    paths = {path.stem.partition("_")[0]: path for path in sorted(HERE.glob("*.md")) if path.name != "README.md"}
    if unknown := set(arguments.chapters) - paths.keys():
        parser.error(f"there is no chapter {min(unknown)}; there are {', '.join(paths)}")
    slow = {name for name, path in paths.items() if "<!-- slow -->" in path.read_text("utf-8")}
    chosen = arguments.chapters or [name for name in paths if name not in slow]
    if len(chosen) > 1:
        sys.exit(run_each(chosen, arguments.check))
    (path,) = (paths[name] for name in chosen)
    if arguments.notebooks:
        print(*(f"{written.name}: written" for written in write_notebooks(path, HERE)), sep="\n")
        return
    import matplotlib

    matplotlib.use("Agg")
    with workplace(), matplotlib.rc_context(STYLE):
        chapter = Chapter(path, arguments.check)
        chapter.run()
    told = "as it stands" if not chapter.differences else f"{len(chapter.differences)} outputs are others"
    print(f"{path.name}: {told}" + ("" if arguments.check else ", and written"))
    if arguments.check and chapter.differences:
        sys.exit("\n\n".join(chapter.differences))


if __name__ == "__main__":
    main()
