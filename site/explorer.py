"""Put the explorer on the site, and its small explorables into the chapters that have a place for one.

A chapter has a place where its Markdown has `<div class="explorable" data-explorable="nf4"></div>`, of which a viewer
without scripts shows nothing.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import nbformat
import pack
from sphinx.application import Sphinx

sys.path.insert(0, str(pack.ROOT / "tutorials"))
import run

SCRIPTS = ("nf4", "lora", "by_hand", "swallowed", "dora_row", "training")


def add_scripts(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: object) -> None:
    """Load the scripts into a page that has a place for an explorable (a handler of `html-page-context`)."""
    if app.builder.name == "html" and "data-explorable" in context.get("body", ""):
        app.add_css_file("../explore/explore.css")
        for name in SCRIPTS:
            app.add_js_file(f"../explore/{name}.js", loading_method="defer")


def copy_pages(app: Sphinx, exception: Exception | None) -> None:
    """Pack the weights, and copy the explorer beside the other pages (a handler of `build-finished`)."""
    if app.builder.name == "html" and exception is None:
        pack.main()
        shutil.copytree(pack.OUT.parent, Path(app.outdir, "explore"), dirs_exist_ok=True)


def write_notebooks(app: Sphinx, exception: Exception | None) -> None:
    """Write each chapter as a notebook that has not run, without its solution (a handler of `build-finished`)."""
    if app.builder.name != "html" or exception is not None:
        return
    folder = Path(app.outdir, "notebooks")
    folder.mkdir(exist_ok=True)
    for chapter in sorted((pack.ROOT / "tutorials").glob("[01A][0-9]_*.md")):
        notebook = run.make_notebook(chapter)
        run.remove_solution(notebook)
        nbformat.write(notebook, folder / f"{chapter.stem}.ipynb")
