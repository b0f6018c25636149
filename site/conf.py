"""How Sphinx builds the site.

    pip install -e '.[site]' && python -m sphinx -W -b html site _site          # open _site/index.html
    python -m sphinx -W -b singlehtml site _print                               # one page, to print
    python -m sphinx -W -t class -b html site _class                            # without solutions and answers

The sources are the Markdown and the Python of the checkout; `pages.py` copies them into the folder of the build.
"""

import sys
from pathlib import Path

import latex2mathml.converter
from docutils import nodes
from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).parent))
import explorer
import pages

project = "minilora"
extensions = ["myst_parser"]
myst_enable_extensions = ["attrs_inline", "colon_fence", "dollarmath"]
myst_heading_anchors = 4
suppress_warnings = ["myst.header", "misc.highlighting_failure"]

html_theme = "furo"
html_title = "minilora"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_js_files = [("copy.js", {"defer": "defer"})]
html_math_renderer = "mathml"
html_copy_source = False
html_show_search_summary = False  # it fetches pages, which a browser forbids for files on the disk
html_show_sphinx = False
html_show_copyright = False
html_theme_options = {"sidebar_hide_name": False, "navigation_with_keys": True}
pygments_style = "a11y-high-contrast-light"
pygments_dark_style = "a11y-high-contrast-dark"


def mathml(translator, node: nodes.Node) -> None:
    """Write an equation as MathML, which browsers show without a script."""
    display = "block" if isinstance(node, nodes.math_block) else "inline"
    translator.body.append(latex2mathml.converter.convert(node.astext(), display=display))
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    app.add_html_math_renderer("mathml", (mathml, None), (mathml, None))
    app.connect("config-inited", pages.collect)
    app.connect("html-page-context", explorer.add_scripts)
    app.connect("build-finished", explorer.copy_pages)
    app.connect("build-finished", explorer.write_notebooks)
