"""The tutorials come out as they stand, their form is kept, and their exercises can be failed."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

import minilora as ml
from minilora.cli import parse
from tests.files import pretrained

ROOT = Path(__file__).parents[1]
TUTORIALS = ROOT / "tutorials"
CHAPTERS = sorted(path for path in TUTORIALS.glob("[01A][0-9]_*.md") if path.name != "00_whole.md")
EXECUTED = sorted(path for path in TUTORIALS.glob("*.md") if path.name != "README.md")
PAGES = [TUTORIALS / "00_whole.md", *CHAPTERS, TUTORIALS / "README.md", TUTORIALS / "data/devil/README.md"]
SOLUTION = re.compile(r"<details><summary>Solution</summary>\n\n```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
MAX_FIGURE = 60_000  # bytes

# number of the exercise -> what to replace in its solution, and by what, so that it is wrong; what the verdict says
MISTAKES = {
    "01": [
        ("s * (r**0.5 if", "s * (r if"),
        (' if path != "lm_head"', "", "more than A and B have"),
        ("(frozen + trained)", "frozen", "times the right one"),
        ("(s[:, None] * (x @ A.T)) @ B.T", "(x @ A.T) @ B.T", "y without s"),
        ("(s[:, None] * (x @ A.T)) @ B.T", "s[:, None] * (x @ (B @ A).T)", "are enough"),
        ("s[:, None] *", "s[0] *", "the first row's s"),
        ("s * (B @ A)", "(B @ A)"),
        ("W = W + s", "W += s"),
        ('config["use_rslora"]', "False", "it is 0.50 times the right one"),
        ("r = len(A)", 'r = config["r"]', "model.layers.1.x.down", "it is 0.50 times the right one"),
        *(
            (
                'tensors[f"base_model.model.{path}.lora_{letter}.weight"] for',
                f'[t for n, t in tensors.items() if {found} and f"lora_{{letter}}" in n][{which}] for',
                "this is the update of",
            )
            for found in ("path in n", 'f"{path}.lora" in n', 'n.startswith(f"base_model.model.{path}")')
            for which in (0, -1)
        ),
    ],
    "02": [
        ("-(-rows // batch_size) * epochs", "-(-rows * epochs // batch_size)"),
        ("labels[1:]", "labels"),
        ("sum(losses) / len(losses)", "sum(sum(each) / len(each) for each in found) / len(found)"),
        ("evaluations[step], step", "evaluations[step], -step"),
    ],
    "03": [
        ("sum(total for total, _ in parts) / sum(count for _, count in parts)", "parts[0][0] / parts[0][1]"),
        ("[-100] * (width - len(labels) + 1)", "[pad] * (width - len(labels) + 1)"),
        ('reduction="sum"', 'reduction="mean"'),
        ("return text[:cut], text[cut:]", "return text[:cut], text[cut:].lstrip()", "together they read"),
        ("row = tokenizer.encode(text).ids", "return prompt, completion", "by itself the prompt"),
        ("row = tokenizer.encode(text).ids", "return prompt.rstrip(), text[len(prompt.rstrip()) :]", "shorter than"),
        ("range(len(prompt), -1, -1)", "range(len(text), -1, -1)", "a piece of the answer"),
    ],
    "04": [
        (" + rate_A * rate_B * s**3 * G @ A.T @ B.T @ G", "", "A small step is right"),
        ("rate_B * G @ A.T @ A + rate_A * B", "rate_A * G @ A.T @ A + rate_B * B", "A small step is wrong too"),
        ("dy @ W + h @ A", "dy @ W", "How many ways"),
        ("h = s * dy @ B", "h = dy @ B", "through A lacks a factor of 2"),
        ("h.flatten(0, -2).T @ x.flatten(0, -2)", "s * B.T @ (dy.flatten(0, -2).T @ x.flatten(0, -2))"),
        ("h.flatten(0, -2).T @ x.flatten(0, -2)", "h.mT @ x if h.dim() == 2 else (h.mT @ x).sum(0)", "dA is (3, 2, 3)"),
        ("unseen - columns @ columns.T @ unseen", "unseen", "what only one sees"),
        ("rows, _ = torch.linalg.qr(A.T)", "rows = A.T", "multiplied by 10"),
        ("(unseen.norm() ** 2 / G.norm() ** 2)", "(unseen.norm() / G.norm())", "the sum of the squares"),
    ],
    "05": [
        ("s * math.sqrt(r)", "s * r"),
        ("(1 / few - 1 / many)", "(many - few)"),
        ("rate, rate * s / new_s", "rate, rate * new_s / s"),
    ],
    "06": [
        ("(B.T @ B) @ (A @ A.T)", "B.T @ B @ A @ A.T @ B.T @ B @ A @ A.T", "square of one"),
        ("torch.linalg.eigvals((B.T @ B) @ (A @ A.T)).real", "torch.linalg.svdvals(B @ A).square()", "as large as B A"),
        ("[s * B for", "[B for"),
        ("svd(delta @ x.T,", "svd(delta,", "the best cut of ΔW misses"),
        ("svd(delta @ x.T,", "svd(delta @ x.T @ x @ delta.T @ delta,", "Which matrix"),
        (".U[:, :r]", ".U[:, -r:]", "Which matrix"),
    ],
    "07": [
        ("budget // sum(width + out for width, out in shapes)", "budget // max(sum(each) for each in shapes)"),
        (
            "[item for parent in model.modules() for item in parent._modules.items()]",
            "[(path.rpartition('.')[2], child) for path, child in model.named_modules()]",
            "need 2",
        ),
        ("setattr(parent, name, adapters[child])", "setattr(parent, name, wrap(child))"),
        ("name in names", "name.endswith(tuple(names))"),
        ("parent._modules.items()", "list(parent.named_children())"),
    ],
    "08": [
        ("max(0, left // sum(costs.values()))", "left // sum(costs.values())"),
        ("16 * (out + width)", "8 * (out + width)"),
        ("return 16 * weights", "return 12 * weights"),
        ("4 * weights + 16 * r", "16 * weights + 16 * r"),
        ("rows % n == 0 and", ""),
        ("rows // n * row_bytes", "rows * row_bytes"),
    ],
    "09": [
        ("blocks / blocks.abs().amax(1, keepdim=True)", "blocks"),
        ("-1, 0, 1\n", "-1, levels[7], 1\n"),
        ("8 + 32 / group_size", "8 + 32"),
        ("8 - bits, -1, -bits", "0, 8, bits", "you find [2, 9, 7, 0]"),
        ("2**bits - 1", "15", "2 bits a code"),
    ],
    "10": [
        ("** 0.5)", ")"),
        ("min(1.0, (budget / kl(after)) ** 0.5)", "(budget / kl(after)) ** 0.5"),
        ("base.log_softmax(-1), tuned.log_softmax(-1)", "tuned.log_softmax(-1), base.log_softmax(-1)"),
        ("base.log_softmax(-1), tuned.log_softmax(-1)", "base.softmax(-1).log(), tuned.softmax(-1).log()"),
        ("task * share / (1 - share)", "task * share"),
    ],
    "11": [
        (".bfloat16() == W", ".bfloat16() != W", "those that changed"),
        ("(kept != 0) & (kept.sign() == kept.sum(0).sign())", "kept != 0", "which sign was elected"),
        ("round(density * change.numel())", "change.numel()", "were kept"),
        ("max(1, round(density * change.numel()))", "round(density * change.numel())", "10 numbers, density 0.01"),
        ("effect += delta", "effect += W.double()"),
        ("s * (B.double() @ A.double())", "B.double() @ A.double()"),
    ],
    "12": [
        ("s * B @ A", "B @ A", "Is there an s in it?"),
        ("V / V.norm(dim=1, keepdim=True)", "V", "How long is the row that m multiplies?"),
        (".sum(dim=0)", ".mean(dim=0)", "What does a gradient do with several rows of x?"),
        ("(sigma[-r:] / s)", "sigma[-r:]", "the singular values"),
        ("W - s * (B @ A)", "W", "not the old one"),
        ("root[:, None] * Vh[-r:], U[:, -r:] * root", "Vh[-r:], U[:, -r:] * root**2", "lengths"),
        ("STUDENT[n] *", "1.96 *", "know their own spread"),
        ("STUDENT[n] * statistics.stdev(differences) / n**0.5", "0"),
        ("/ n**0.5", "", "of one seed, or of the mean"),
        ("-margin <= middle - half and middle + half <= margin", "abs(middle) <= margin", "shown that there is none"),
        (
            "-margin <= middle - half and middle + half <= margin",
            "middle - half <= 0 <= middle + half",
            "shown that there is none",
        ),
        ("-margin <= middle - half and middle + half <= margin", "False", "even the ends of the interval"),
        ("-margin <= middle - half and ", "", "Where are the two ends"),
        ("middle - half <= 0 <= middle + half", "middle - half <= 0", "side of 0"),
        ("statistics.stdev", "statistics.pstdev"),
    ],
    "13": [
        ("s * B @ A", "B @ A"),
        ("sigma[:k].norm()", "sigma.norm()", "How many directions of the change"),
        ("/ min(i, j)", "/ max(i, j)", "2,000 random pairs"),
        ("(V @ other.T).square()", "(V @ other.T).abs()", "Is it cosines"),
        (".item() / k", ".item()", "How large can it be"),
        (".Vh[:k] for", ".U.T[:k] for", "what they answer"),
    ],
    "A1": [
        ("- (policy_rejected", "+ (policy_rejected"),
        ("beta * margin", "margin"),
        ("first - 1 : -1", "first:", "Which row"),
        ("logits[first - 1 : -1], tokens[first:]", "logits[:-1], tokens[1:]", "the prompt"),
        ("each.sum()", "each.mean()"),
        ("/ lengths).T", "/ lengths.sum(1, keepdim=True)).T", "divide the whole margin"),
        (
            "((policy - reference.detach()) / lengths).T",
            "(policy / lengths - reference.detach()).T",
            "What has changed",
        ),
        ("((policy - reference.detach()) / lengths).T", "((policy - reference) / lengths).T", "a constant here"),
    ],
    "A2": [
        (
            "(rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)",
            "rewards.mean(1, keepdim=True)",
            "others?",
        ),
        ("leave_one_out(rewards).detach()", "leave_one_out(rewards)", "Which factor is a constant"),
    ],
}


def load_script(path):
    """A file that is in no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # where data classes look for their module
    spec.loader.exec_module(module)
    return module


run, exercises = (load_script(path) for path in (TUTORIALS / "run.py", TUTORIALS / "exercises/check.py"))


def text_of(path):
    return path.read_text(encoding="utf-8")


def solutions(chapter):
    return SOLUTION.findall(text_of(chapter))


def is_slow(chapter):
    return "<!-- slow -->" in text_of(chapter)


def by_name(paths):
    return [pytest.param(path, id=path.relative_to(TUTORIALS).as_posix()) for path in paths]


@pytest.mark.long
@pytest.mark.parametrize("chapter", by_name(path for path in EXECUTED if not is_slow(path)))
def test_a_chapter_comes_out_as_it_stands(chapter):
    pytest.importorskip("matplotlib")
    if "from transformers import" in text_of(chapter):
        pytest.importorskip("transformers")
    command = [sys.executable, TUTORIALS / "run.py", "--check", chapter.stem.partition("_")[0]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # another chapter runs beside it
    done = subprocess.run(command, capture_output=True, encoding="utf-8", cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.real
@pytest.mark.long
@pytest.mark.parametrize("chapter", by_name(path for path in EXECUTED if is_slow(path)))
def test_a_slow_chapter_comes_out_as_it_stands(chapter):
    pretrained("smollm2")
    test_a_chapter_comes_out_as_it_stands(chapter)


def test_a_chapter_has_the_parts_that_every_chapter_has():
    for chapter in CHAPTERS:
        text, number = text_of(chapter), chapter.name[:2]
        assert text.startswith(f"# {number.lstrip('0')}. ")
        assert len(run.COST.findall(text)) == 1, number
        minutes = int(re.search(r"^\*Reads in (\d+) min", text, re.MULTILINE)[1])
        assert minutes == run.reading_minutes(text) <= 25, number
        goal = re.search(r"^\*\*Goal\.\*\*.*?\n\n((?:- .*?\n(?:  .*\n)*)+)", text, re.MULTILINE)
        assert goal[1].count("- ") == 3, number
        assert text.count("> [!IMPORTANT]\n> **Takeaway.**") == 1, number
        assert f"python tutorials/exercises/check.py {number}\n" in text
        assert SOLUTION.search(text), number
        assert text.rpartition("\n\n")[2].startswith("**Next:**"), number
        assert all(cell["code"].count("\n") <= 40 for cell in run.CELL.finditer(text)), number


def test_every_chapter_asks_for_a_prediction_before_its_output():
    for chapter in EXECUTED:
        if re.match("[01A][0-9]_", chapter.name):
            text = text_of(chapter)
            question = (
                r"^\*\*Predict:\*\*(?:.+\n)+\n(?:<details><summary>.+</summary>\n\n)?"
                r"<!-- (?:[^\n]* )?predict -->\n```(?:python|sh)\n"
            )
            asked = re.findall(question, text, re.MULTILINE)
            assert len(asked) == text.count("predict -->") >= 1, chapter.name


def test_quotations_are_what_the_file_says_and_linked_names_are_defined():
    for page in EXECUTED:
        for quotation in run.QUOTATION.finditer(text_of(page)):
            assert quotation["code"] == run.source(quotation["name"]), page.name
        for name, path in re.findall(r"\[`([\w.]+)`\]\((\.\./minilora/[\w/]+\.py)\)", text_of(page)):
            definition = rf"^\s*(?:def |class )?{name.rpartition('.')[2]}\b"
            assert re.search(definition, text_of(page.parent / path), re.MULTILINE), (page.name, name, path)


def test_every_figure_is_shown_with_a_text_and_is_small():
    shown = {
        TUTORIALS / image["path"]: image["alt"] for page in EXECUTED for image in run.IMAGE.finditer(text_of(page))
    }
    assert set((TUTORIALS / "figures").iterdir()) <= set(shown)
    assert not [path.name for path, alt in shown.items() if len(alt) < 40]
    assert not [path.name for path in shown if path.exists() and path.stat().st_size > MAX_FIGURE]


def test_every_minilora_command_parses():
    text = "\n".join(map(text_of, PAGES)).replace("\\\n", " ")
    for command in {*re.findall(r"^minilora (.*)$|`minilora ([^`\n]*)`", text, re.MULTILINE)}:
        with suppress(ml.FormatError):  # an adapter that the page makes is not there yet
            parse(shlex.split("".join(command).partition(" | ")[0], comments=True))


def test_every_chapter_has_an_exercise_and_planted_mistakes():
    numbers = {path.name[:2] for path in CHAPTERS}
    assert {path.name[2:4] for path in (TUTORIALS / "exercises").glob("ex*.py")} == numbers == set(MISTAKES)


@pytest.mark.parametrize("chapter", by_name(CHAPTERS))
def test_the_check_of_an_exercise_accepts_the_solution_and_refuses_the_stub(chapter, tmp_path, monkeypatch, capsys):
    number, answer = chapter.name[:2], tmp_path / "answer.py"
    answer.write_text("\n\n".join(solutions(chapter)), encoding="utf-8")
    for argv, ending, status in (([number], "not yet: nothing is written yet", 1), ([number, str(answer)], "right", 0)):
        monkeypatch.setattr(sys, "argv", ["check.py", *argv])
        with pytest.raises(SystemExit) as ended:
            exercises.main()
        lines = capsys.readouterr().out.splitlines()
        assert lines
        assert all(re.fullmatch(rf"(\w+: )?{ending}", line) for line in lines)
        assert ended.value.code == status


@pytest.mark.parametrize("number", MISTAKES)
def test_the_check_of_an_exercise_refuses_a_mistake_in_each_part_and_keeps_the_answer(number, tmp_path):
    (chapter,) = TUTORIALS.glob(f"{number}_*.md")
    solution, refused = "\n\n".join(solutions(chapter)), set()
    for right, wrong, *words in MISTAKES[number]:
        assert right in solution
        (tmp_path / "answer.py").write_text(solution.replace(right, wrong), encoding="utf-8")
        found = {part: text for part, text in exercises.verdicts(number, tmp_path / "answer.py").items() if text}
        assert found, (right, wrong)
        assert right not in " ".join(found.values())
        assert all(each in " ".join(found.values()) for each in words), (wrong, found)
        refused |= found.keys()
    assert refused == exercises.verdicts(number, TUTORIALS / f"exercises/ex{number}.py").keys()


def test_a_verdict_names_the_line_of_an_answer_that_raised_and_a_function_without_return(tmp_path, monkeypatch, capsys):
    answer = tmp_path / "answer.py"
    answer.write_text(
        """\
import torch
def alpha_for(s, r, use_rslora):
    s * r
def count(linears, r):
    return sum(
        one(linear) for linear in linears.values())
def one(linear):
    assert linear[2]
def forward(x, W, A, B, s):
    return torch.nn.functional.linear(x, W.T)
def merge(W, adapters):
    raise NotImplementedError
def read_update(directory, path):
    raise NotImplementedError("and this is meant")
""",
        encoding="utf-8",
    )
    monkeypatch.setattr(sys, "argv", ["check.py", "1", os.path.relpath(answer)])
    with pytest.raises(SystemExit):
        exercises.main()
    alpha_for, count, forward, merge, read_update = capsys.readouterr().out.splitlines()
    assert alpha_for.startswith("alpha_for: not yet: alpha_for returns None")
    assert count == "count: not yet: IndexError: tuple index out of range (your line 8)"
    assert forward.startswith("forward: not yet: RuntimeError: ")
    assert forward.endswith(" (your line 10)")
    assert merge == "merge: not yet: nothing is written yet"
    assert read_update == "read_update: not yet: NotImplementedError: and this is meant (your line 14)"


@pytest.mark.parametrize("number", ["01", "07", "A2"])  # short ones; the last two read files of the checkout
def test_a_notebook_runs_anywhere_and_its_solution_is_folded_or_left_out(number, tmp_path, monkeypatch):
    pytest.importorskip("ipykernel")
    nbformat = pytest.importorskip("nbformat")
    (chapter,) = TUTORIALS.glob(f"{number}_*.md")
    monkeypatch.chdir(tmp_path)
    whole, without = (nbformat.read(path, 4).cells for path in run.write_notebooks(chapter, tmp_path))
    assert any("Reads in" in cell.source for cell in whole)
    assert not any("needs SmolLM2" in cell.source for cell in whole)
    assert all(cell.outputs for cell in whole if cell.cell_type == "code" and "\nprint(" in cell.source)
    answers = [answer.strip() for answer in solutions(chapter)]
    folded = [cell for cell in whole if cell.source in answers]
    assert len(folded) == len(answers)
    for cell in folded:
        assert cell.metadata.jupyter.source_hidden
        assert {"hide-input", "solution"} <= {*cell.metadata.tags}
    assert without == [cell for cell in whole if "solution" not in cell.metadata.get("tags", ())]
    assert not any(answer in cell.source for answer in answers for cell in without)
    assert "**Next:**" in without[-1].source


PAGE = """\
# 1. A chapter

<!-- quoted: lora.lora_scale -->
```py
old
```

```python
x = 2
print('x is', x)
```
"""


def test_quotations_and_outputs_are_written_and_differences_noticed(tmp_path):
    page = tmp_path / "01_page.md"
    page.write_text(PAGE, encoding="utf-8")
    run.Chapter(page, check=False).run()
    written = text_of(page)
    assert "```py\ndef lora_scale(" in written
    assert "```text\nx is 2\n```" in written
    for old, new, count in (("", "", 0), ("x is 2", "x is 3", 1), ("def lora_scale", "def lora_size", 1)):
        page.write_text(written.replace(old, new), encoding="utf-8")
        chapter = run.Chapter(page, check=True)
        chapter.run()
        assert len(chapter.differences) == count
