"""The Python and the commands of README and docs run as they stand, with a small chat model and some rows."""

import ast
import re
import shlex
from pathlib import Path

import pytest
import torch

import minilora as ml
import minilora.runs.inputs
from benchmarks import laptop
from benchmarks.results import code_hash
from benchmarks.scale import known_config
from minilora import cli
from minilora.cli.dry_run import METHODS, default_plan
from minilora.models.config import FAMILIES
from minilora.runs.encoders import Dataset
from minilora.runs.memory import amount, forecast
from scripts import api, front
from tests.models import long, tiny_model
from tests.runs import flags_of, type_in, write_rows
from tests.text import CHATML, CLOSE, write_tokenizer

ROOT = Path(__file__).parents[1]
PAGES = {
    path.name: path.read_text(encoding="utf-8")
    for path in [*ROOT.glob("docs/*.md"), *ROOT.glob("docs/internals/*.md"), ROOT / "README.md"]
}
README = PAGES["README.md"]
BLOCK = r"(?<!-->\n)```{}\n(.*?)```"  # those after a mark are run by CI, or quote the code
COMMANDS = {name: "\n".join(re.findall(BLOCK.format("sh"), page, flags=re.DOTALL)) for name, page in PAGES.items()}
SIDE_BY_SIDE = "side_by_side.md"  # its Python needs the peers: tests/parity/test_side_by_side.py
PYTHON = [
    (name, block)
    for name, page in PAGES.items()
    for block in re.findall(BLOCK.format("python"), page, re.DOTALL)
    if name != SIDE_BY_SIDE
]
WITH_COMMANDS = [name for name, commands in COMMANDS.items() if commands]
MODEL = Path("path", "to", "model")
ON_THE_HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """A tiny chat model, whose projections are as wide as the README's ranks are high, and some rows."""
    monkeypatch.chdir(tmp_path)
    model = tiny_model(dtype=torch.float32, vocab_size=400, num_hidden_layers=1, num_key_value_heads=4)
    ml.save_model(model, MODEL, write_tokenizer(MODEL, template=CHATML, eos=CLOSE))
    write_rows(tmp_path / "rows.jsonl", 9)
    (tmp_path / "rows.csv").write_text("instruction,output\n" + "".join(f"Which number?,{i}\n" for i in range(9)))
    return tmp_path


@pytest.mark.usefixtures("directory")
@pytest.mark.parametrize(("page", "block"), PYTHON)
def test_the_python_of_the_pages_runs(page, block):
    exec(compile(block, page, "exec"), names := {})
    if "encode_chat" in block:  # the model is asked as it was trained
        assert names["tokenizer"].decode(names["prompt"], skip_special_tokens=False).endswith("assistant\n")
    if '"merged"' in block:
        merged = ml.load_model("merged")
        assert ml.count_parameters(merged) == ml.count_parameters(ml.load_model(MODEL))
        ml.load_adapter(merged, "adapter")


@pytest.mark.parametrize("page", ["README.md", *long(*(page for page in WITH_COMMANDS if page != "README.md"))])
def test_the_commands_of_a_page_run_one_after_the_other(page, directory, monkeypatch, capsys):
    if "minilora plot" in COMMANDS[page]:
        pytest.importorskip("matplotlib")
    monkeypatch.setattr(minilora.runs.inputs, "load_general", lambda *_: Dataset(()))
    for line in filter(None, COMMANDS[page].splitlines()):
        echo, _, command = line.rpartition(" | ")
        type_in(monkeypatch, "\n".join(shlex.split(echo)[1:]))
        program, *words = shlex.split(command.replace(ON_THE_HUB, str(MODEL)), comments=True)
        assert program == "minilora"
        assert cli.main(words) == 0, f"{line}\n{capsys.readouterr().err}"


def test_what_the_tables_for_users_of_other_libraries_name_is_there():
    ours = [row.split(" | ")[1:] for row in PAGES["migration.md"].splitlines() if row.startswith("| ")]
    assert len(ours) >= 20
    flags = {flag.replace("_", "-") for command in cli.COMMANDS for flag in flags_of(command)}
    assert {*re.findall(r"--([a-z-]+)", str([row[-1] for row in ours]))} <= flags
    assert {*re.findall(r"\bml\.(\w+)", str(ours))} <= {*dir(ml)}
    assert {*re.findall(r"`minilora (\w+)`", str(ours))} <= {*cli.COMMANDS}


def test_the_tables_of_flags_say_what_the_command_answers():
    answered = 0
    for row in re.findall(r"^\| `.*", PAGES["migration.md"].partition("## Flags\n")[2], re.MULTILINE):
        theirs, ours = row.split(" | ")[:2]
        for name in re.findall(r"`(?:--)?([\w-]+)", theirs):
            answer = cli.FOREIGN_FLAGS.get(f"--{name.replace('_', '-')}", "")
            assert all(flag in ours for flag in re.findall(r"--[a-z-]+", answer)), name
            answered += bool(answer)
    assert answered >= 30


def test_the_readme_is_short_and_names_the_pages_and_the_documents_the_families():
    assert len(README.splitlines()) <= 110
    pages = dict(re.findall(r"^\| \[`(\w+)\.py`\]\(minilora/\1\.py\) \|.*\| (\d+) \|$", README, flags=re.MULTILINE))
    assert [*pages] == ["lora", "nf4", "llama", "adapter", "data", "training"]
    for page, lines in pages.items():
        there = (ROOT / "minilora" / f"{page}.py").read_text(encoding="utf-8").splitlines()
        assert abs(len(there) - int(lines)) <= 20, page
    assert re.findall(r"^\| `(\w+)` \|", PAGES["models.md"], re.MULTILINE) == ["model_type", *FAMILIES]
    assert (" one of ten " in README) == (len(FAMILIES) == 10)


def test_the_code_that_the_readme_quotes_is_that_of_the_page():
    page, quoted = re.findall(r"<!-- from: (\S+) -->\n```python\n(.*?)```", README, flags=re.DOTALL)[0]
    written = {
        node.name: node for node in ast.parse((ROOT / page).read_text(encoding="utf-8")).body if hasattr(node, "name")
    }
    for function in ast.parse(quoted).body:
        there = written[function.name]
        there.body = there.body[1:]  # without its docstring
        assert ast.unparse(there) == ast.unparse(function)


def test_the_figures_of_a_release_were_measured_at_its_own_code():
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)[1]
    code, _ = front.measured()
    assert newest == "Unreleased" or (newest, code) == (ml.__version__, code_hash())


def test_the_tables_of_readme_and_docs_are_what_scripts_write():
    measured = front.measured()
    assert front.table_of_readme(*measured, PAGES["results.md"]) in README
    assert front.table_of_results(*measured) in PAGES["results.md"]
    assert PAGES["api.md"] == api.page()
    smallest = next(iter(laptop.MODELS))
    assert f"| {' | '.join(laptop.row(smallest))} |" in PAGES["laptop.md"]
    for size in ("7B", "70B"):
        peaks = []
        for method, ways in METHODS.items():
            found = forecast(default_plan(known_config(size), method, torch.device("cpu")))
            peaks += [amount(found[way].peak) for way in ways]
        assert f"| {' | '.join([size, *peaks])} |" in PAGES["results.md"]


def test_the_command_of_the_readme_repeats_its_table():
    works, peers = re.search(
        r"-m benchmarks .*?--only ([\w\s-]+?)\s--peers ([\w\s-]+?)\s--", README, re.DOTALL
    ).groups()
    assert {*works.split()} == {work for work, _ in front.IN_README}
    assert {*peers.split()} == {peer for _, peer in front.IN_README}


def test_the_run_and_the_bag_of_words_of_the_readme_are_in_the_results():
    losses, accuracies = zip(*re.findall(r"^(?:base|adapter) +([\d.]+) +([\d.]+)$", README, re.MULTILINE), strict=True)
    figures = " | ".join(f"{float(number):.3f}" for number in (*accuracies, *losses))
    assert f"| 0 | {figures} |" in PAGES["results.md"]
    by_counting = [
        re.search(r"a bag of words\b.*?(0\.\d+)", page, re.DOTALL)[1] for page in (README, PAGES["results.md"])
    ]
    assert len({*by_counting}) == 1


def test_the_start_is_plain_markdown_for_a_forge():
    start = re.sub(r"<!--.*?-->", "", (ROOT / "site" / "index.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert not re.findall(r"^:{3,}|^`{3,}\{|\)\{", start, re.MULTILINE)  # what only MyST reads


def test_the_pages_and_the_code_use_plain_words():
    odd = r"\b(?:in four bits|(?:is|are) mended|(?:is|are) learned of|recipe of others|once a step|of whose)\b"
    texts = {name: page for name, page in PAGES.items() if name not in ("api.md", "paper_claims.md")}
    sources = [ROOT / "nanolora.py", *(ROOT / "minilora").rglob("*.py")]
    texts |= {str(path): path.read_text(encoding="utf-8") for path in sources}
    assert not [(name, found) for name, text in texts.items() for found in re.findall(odd, text)]


def test_links_lead_somewhere():
    pages = [page for folder in ("docs", "tutorials") for page in (ROOT / folder).rglob("*.md")]
    for path in [*ROOT.glob("*.md"), ROOT / "site" / "index.md", *pages]:
        text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        for named in re.findall(r"(?<![\w/])tests/[\w/]+\.py", text):
            assert (ROOT / named).exists(), f"{path.name}: {named}"
        for file, function in re.findall(r"\b(test_\w+\.py)::(\w+)", text):
            assert f"def {function}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), f"{path.name}: {function}"
        for link in re.findall(r"\]\(([^)\s]+)\)|(?:src|srcset)=\"([^\"]+)\"", text):
            target, _, anchor = "".join(link).partition("#")
            if target.startswith("http"):
                continue
            found = path.parent / target if target else path
            assert found.exists(), f"{path.name}: {target}"
            assert not anchor or anchor in anchors(found), f"{path.name}: #{anchor}"


def anchors(page):
    heads = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


def test_the_pages_that_errors_name_are_there():
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "minilora").rglob("*.py")]
    named = {*re.findall(r"[\"'](\w+\.md)(?:#([\w-]+))?[\"']|see docs/(\w+\.md)", "\n".join(sources))}
    assert ("guide.md", "1-the-data", "") in named
    for page, anchor, other in named:
        assert not anchor or anchor in anchors(ROOT / "docs" / page), f"{page}#{anchor}"
        assert (ROOT / "docs" / (page or other)).is_file()
