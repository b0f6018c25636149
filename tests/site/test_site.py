"""The site builds without a warning, and opens from the disk in a browser: whole, readable, and by itself."""

import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

sphinx = pytest.importorskip("sphinx", reason="needs the extra `site`: pip install -e '.[site]'")

ROOT = Path(__file__).parents[2]
WIDTHS = (390, 1400)
pytestmark = pytest.mark.site


def build(builder: str, folder: Path, *options: str) -> Path:
    command = [sys.executable, "-m", "sphinx", "-W", "-q", *options, "-b", builder, str(ROOT / "site"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return build("html", tmp_path_factory.mktemp("site"))


def pages(site: Path) -> list[Path]:
    return sorted(path for path in site.rglob("*.html") if not path.is_relative_to(site / "_static"))


def test_every_page_opens_from_the_disk_without_an_error(site, open_page):
    found = pages(site)
    assert len(found) > 60
    page = open_page(site / "index.html")
    missing = []
    for path in found:
        page.goto(path.as_uri())
        # The browser itself resolves where links and pictures lead.
        links = page.evaluate("[...document.links].map(a => a.href)")
        missing += [(path.name, link) for link in links if link.startswith("file:") and not leads_somewhere(link)]
        broken = page.evaluate("[...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)")
        missing += [(path.name, image) for image in broken]
    assert missing == []


def leads_somewhere(link: str) -> bool:
    parts = urlsplit(link)
    target = Path(unquote(parts.path))
    if not target.is_file():
        return False
    anchor = unquote(parts.fragment)
    return not anchor or target.suffix != ".html" or f'id="{anchor}"' in target.read_text(encoding="utf-8")


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_fits_the_width_in_light_and_dark(site, open_page, width, scheme):
    page = open_page(site / "index.html", width, scheme)
    wide = []
    for path in pages(site):
        page.goto(path.as_uri())
        if page.evaluate("document.documentElement.scrollWidth") > width:
            wide.append(path.name)
    assert wide == []
    background, text = page.evaluate(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
        ".map(color => color.match(/\\d+/g).slice(0, 3).reduce((sum, each) => sum + Number(each), 0))"
    )
    assert (background < text) == (scheme == "dark")


def test_the_search_finds_double_quantization(site, open_page):
    page = open_page(site / "search.html")
    page.goto(f"{(site / 'search.html').as_uri()}?q=double+quantization")
    page.wait_for_selector("#search-results li")
    assert "Four bits" in page.inner_text("#search-results li >> nth=0")


def test_a_page_of_the_code_has_its_notes_kernel_test_and_chapter(site, open_page):
    page = open_page(site / "minilora" / "lora.py.html")
    row = page.locator(".row", has_text="def lora_linear(").first
    notes, code = row.locator(".notes"), row.locator(".code")
    assert notes.bounding_box()["x"] < code.bounding_box()["x"]
    assert notes.locator("math").count() >= 1
    assert {"built by hand", "its law"} <= set(notes.locator("a").all_inner_texts())
    kernel = code.locator("details .highlight")
    assert not kernel.is_visible()
    code.locator("summary").click()
    assert kernel.is_visible()


def test_the_pages_hold_every_line_of_the_code(site, open_page):
    for name in ("lora", "nf4", "llama", "adapter", "data", "training"):
        page = open_page(site / "minilora" / f"{name}.py.html")
        shown = "\n".join(page.locator(".row .code > div.highlight-python pre").all_text_contents())
        source = (ROOT / "minilora" / f"{name}.py").read_text(encoding="utf-8")
        for line in source.partition("from __future__")[2].splitlines():
            if line.strip().startswith(("return ", "def ", "class ", "if ", "for ")) and '"""' not in line:
                assert line in shown, f"{name}.py: {line}"


def test_equations_keep_their_words_apart_and_code_stays_code(site, open_page):
    page = open_page(site / "minilora" / "llama.py.html")
    assert any("in\u00a0float32\u00a0at\u00a0least" in each for each in page.locator("math").all_text_contents())
    page.goto((site / "minilora" / "training.py.html").as_uri())
    assert "for step, rows in enumerate(steps):\n    optimizer" in "".join(page.locator("pre").all_text_contents())


def test_the_print_version_is_one_page_without_controls_and_for_a_class_without_answers(tmp_path, open_page):
    page = open_page(build("singlehtml", tmp_path, "-t", "class") / "index.html")
    page.emulate_media(media="print")
    assert {"1. A LoRA layer in 15 lines", "10. Did it forget?"} <= set(page.locator("h2").all_inner_texts())
    assert not page.get_by_text("Skip to content").is_visible()
    assert page.locator("details:not([open]) pre").first.evaluate("element => element.checkVisibility()")
    assert not page.get_by_text("[!IMPORTANT]").count()
    folds = page.locator("summary").all_inner_texts()
    assert "Hint 1" in folds
    assert "Solution" not in folds
    collected = "".join(path.read_text("utf-8") for path in (tmp_path / ".doctrees" / "pages").rglob("*.md"))
    assert not [each for each in ("def fitted", "def keep_largest", "questions for an exam") if each in collected]


def test_chapters_hold_the_explorables_and_the_site_holds_the_explorer(site, open_page):
    page = open_page(site / "explore" / "index.html")
    assert "animal" in page.inner_text("#verdict")
    for chapter in ("04_gradients", "05_scale_and_rate", "09_four_bits", "12_dora_and_starts", "11_merging"):
        page.goto((site / "tutorials" / f"{chapter}.html").as_uri())
        assert page.locator(".explorable input").count() >= 2


def test_a_prediction_comes_before_its_output_and_chapters_are_notebooks_without_solutions(site, open_page):
    page = open_page(site / "tutorials" / "06_why_low_rank.html")
    folded = page.locator("details", has_text="What came out").first
    assert not folded.locator("pre").first.is_visible()
    folded.locator("summary").click()
    assert folded.locator("pre").first.is_visible()
    assert page.get_by_role("button", name="Copy").count() >= 5
    notebook = (site / "notebooks" / "06_why_low_rank.ipynb").read_text(encoding="utf-8")
    assert "Hint 1" in notebook
    assert "def best_for" not in notebook


def test_lora_on_a_page_prints_on_one_sheet(site, open_page):
    page = open_page(site / "tutorials" / "one_page.html")
    assert page.pdf(format="A4").count(b"/Type /Page\n") == 1
