"""Collect the pages of the site: the Markdown of the checkout, the six pages side by side, and the sources they link.

Sphinx reads them from a folder of the build, in which each page has the path that it has in the checkout.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import side_by_side
from sphinx.application import Sphinx
from sphinx.config import Config

ROOT = Path(__file__).parents[1]
START = Path("site", "index.md")
SINGLE = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "benchmarks/peers_under_test.md", "conformance/README.md")
PICTURES = (".svg", ".png")
CODE_OR_LINK = re.compile(r"^(`{3,}).*?^\1$|(?<=\]\()(?!\w+:)([^)\s#]+)(#[^)\s]*)?(?=\))", re.DOTALL | re.MULTILINE)
PICTURE = re.compile(r'<picture>\s*<source [^>]*srcset="([^"]+)">\s*<img alt="([^"]*)" src="([^"]+)">\s*</picture>')
MYST = re.compile(r"^<!-- site: .*?\n(.*?)^-->", re.DOTALL | re.MULTILINE)  # what a forge would show as it is written
PREDICTED = re.compile(
    r"^<!-- (?:[^\n]* )?predict -->\n(```.*?^```\n(?:\n</details>\n)?)\n(```text\n.*?^```\n)", re.DOTALL | re.MULTILINE
)
SOLUTION = re.compile(r"^<details><summary>Solution</summary>\n.*?^</details>\n", re.DOTALL | re.MULTILINE)
WITHHELD = re.compile(r"(tutorials/experiments|recipes)/\w+\.py|tutorials/(exercises/\w+_check\.py|teaching\.md)")
ORPHAN = "---\norphan: true\n---\n\n# {}\n\n{}\n"
COST = re.compile(r"^\*Reads in .*\*$", re.MULTILINE)  # at the head of a chapter
NOTEBOOK = '<a href="../notebooks/{}.ipynb" download>As a notebook</a>, without the solution.'
LANGUAGES = {".py": "python", ".json": "json", ".toml": "toml", "": "sh"}


def collect(app: Sphinx, config: Config) -> None:
    """Write all pages below the folder of the build, from which Sphinx then reads (a handler of `config-inited`)."""
    app.srcdir = Path(app.doctreedir, "pages")
    paths = [path for pattern in ("docs/**/*.md", "tutorials/*.md", "recipes/*.md") for path in ROOT.glob(pattern)]
    texts = {path.relative_to(ROOT): path.read_text(encoding="utf-8") for path in paths}
    texts |= {Path(name): (ROOT / name).read_text(encoding="utf-8") for name in (*SINGLE, START)}
    texts |= {Path("minilora", f"{name}.py"): side_by_side.page(name) for name in side_by_side.PAGES}
    texts[Path("nanolora.py")] = side_by_side.page("nanolora")
    for path in list(texts):
        text = texts[path].replace("> [!IMPORTANT]\n", "")  # known to GitHub alone; the box stays
        text = MYST.sub(r"\1", text)
        text = PREDICTED.sub(r"\1\n<details><summary>What came out</summary>\n\n\2\n</details>\n", text)
        if "class" in app.tags:
            text = SOLUTION.sub("", text).replace("\ntutorials/teaching\n", "\n")
        text = PICTURE.sub(r"![\2](\3){.only-light}\n![\2](\1){.only-dark}", text)
        text = CODE_OR_LINK.sub(lambda link, page=path: _link(link, page, texts), text)
        if path.match("tutorials/[01A][0-9]_*.md"):
            text = COST.sub(rf"\g<0> {NOTEBOOK.format(path.stem)}", text, count=1)
        texts[path] = text
    for path, text in texts.items():
        if "class" in app.tags and WITHHELD.fullmatch(path.as_posix()):
            text = ORPHAN.format(path, "This page has answers, and the site for a class leaves it out.")
        target = app.srcdir / _place(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in PICTURES:
            shutil.copy2(ROOT / path, target)
        elif not target.exists() or target.read_text(encoding="utf-8") != text:
            target.write_text(text, encoding="utf-8")  # a page that is as it was is not read again


def _link(link: re.Match[str], page: Path, texts: dict[Path, str]) -> str:
    """Return a link as it is on the site; what it leads to gets a page."""
    if link[1]:  # code
        return link[0]
    target = Path(os.path.normpath(page.parent / link[2]))
    target = START if target == Path("README.md") else target
    if target not in texts:
        texts[target] = "" if target.suffix in PICTURES else _source(target)
    return os.path.relpath(_place(target), _place(page).parent) + (link[3] or "")


def _place(path: Path) -> Path:
    """Return the place on the site of a file of the checkout."""
    if path == START:
        return Path("index.md")
    return path if path.suffix in (".md", *PICTURES) else Path(f"{path}.md")


def _source(path: Path) -> str:
    """Return a page that shows a file, or the names in a folder."""
    source = ROOT / path
    if source.is_dir():
        names = sorted(each.name for each in source.iterdir() if not each.name.startswith(("_", ".")))
        text = "\n".join(f"- `{name}`" for name in names)
    else:
        text = f"`````{LANGUAGES.get(path.suffix, 'text')}\n{source.read_text(encoding='utf-8')}\n`````"
    return ORPHAN.format(path, text)
