"""Plant random mistakes, one at a time, and count those that the tests notice.

    python scripts/mutants.py --count 300 --seed 18 [--where lora.py kernels adapters] [--only 3 14 15]

A mistake changes one expression, drops one statement, or exchanges the order of an iteration. The tests are those of
the default suite, without those that compile, that execute the changed line; the quickest come first, and the first
failure ends them. Which they are is recorded once for each state of the sources, in a run of the whole suite, which has
to pass. Some mistakes change no result, as where a block size is chosen for speed alone.
"""

import argparse
import ast
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.planting import Copy  # noqa: E402  # the checkout is no installed package

PAGES = ("lora", "nf4", "llama", "adapter", "data", "training")
RECORD = ROOT / ".cache" / "executed.json"
OPTIONS = ["-q", "-nauto", "-knot compil", "--hypothesis-profile=find", "--ignore=tests/test_planted.py"]
SKIPPED = ("annotation", "returns", "decorator_list")
SWAPS = ((ast.Add, ast.Sub), (ast.Mult, ast.Div), (ast.Lt, ast.LtE), (ast.Gt, ast.GtE), (ast.Eq, ast.NotEq))
SWAPS += ((ast.Is, ast.IsNot), (ast.In, ast.NotIn), (ast.And, ast.Or))
OPERATORS = {ast.FloorDiv: ast.Div, **dict(SWAPS), **{right: left for left, right in SWAPS}}
Executed = Mapping[str, tuple[float, Mapping[str, list[int]]]]  # test -> its seconds, and the lines of each file


class Mistake(NamedTuple):
    file: str
    change: str
    source: str  # of the whole file
    spans: list[range]  # lines of what is changed, and of the statement that it is in


def mistakes(tree: ast.AST, statement: ast.AST | None = None) -> Iterator[tuple[ast.AST, str, ast.AST]]:
    """Each node that can be changed, with its changed source and the statement that it is in.

    Annotations, decorators, error messages and docstrings stay.
    """
    for name, value in ast.iter_fields(tree):
        if name in SKIPPED or isinstance(tree, ast.Raise | ast.ImportFrom):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST):
                continue
            within = child if statement is None or isinstance(child, ast.stmt) else statement
            if name == "iter":
                yield child, f"reversed(list({ast.unparse(child)}))", within
            if isinstance(child, ast.expr | ast.stmt) and (mutated := changed(child)) is not None:
                yield child, mutated, within
            yield from mistakes(child, within)


def changed(node: ast.expr | ast.stmt) -> str | None:
    """The source of the node with a mistake, or None if there is none to make."""
    match node:
        case ast.BinOp(op=op) | ast.BoolOp(op=op) | ast.AugAssign(op=op) if type(op) in OPERATORS:
            node.op = OPERATORS[type(op)]()
        case ast.Compare(ops=[op]):
            node.ops = [OPERATORS[type(op)]()]
        case ast.Constant(value=bool(value)):  # also the `strict=True` of a `zip`
            return str(not value)
        case ast.Constant(value=int(value) | float(value)):
            return repr(value + 1)
        case ast.UnaryOp(op=ast.USub() | ast.Not(), operand=operand):
            return f"({ast.unparse(operand)})"
        case ast.IfExp(body=body):
            return f"({ast.unparse(body)})"
        case ast.Call(func=ast.Name(id="sorted"), args=[values]):
            return f"list({ast.unparse(values)})"
        case ast.Expr(value=ast.Call()):
            return "pass"
        case _:
            return None
    return ast.unparse(node) if isinstance(node, ast.stmt) else f"({ast.unparse(node)})"


def mutants(path: Path) -> Iterator[Mistake]:
    """Each mistake in a file."""
    file, text = path.relative_to(ROOT / "minilora").as_posix(), path.read_text(encoding="utf-8")
    lines = text.encode().splitlines(keepends=True)
    for node, mutated, statement in mistakes(ast.parse(text)):
        begin = len(b"".join(lines[: node.lineno - 1])) + node.col_offset
        end = len(b"".join(lines[: node.end_lineno - 1])) + node.end_col_offset
        before, after = (" ".join(part.split())[:60] for part in (text.encode()[begin:end].decode(), mutated))
        source = (text.encode()[:begin] + mutated.encode() + text.encode()[end:]).decode()
        spans = [range(each.lineno, each.end_lineno + 1) for each in (node, statement)]
        yield Mistake(file, f"{file}:{node.lineno}: {before} -> {after}", source, spans)


def record() -> Executed:
    """Which lines each test executes, of these sources; the suite runs if that is not known."""
    files = sorted([*(ROOT / "minilora").rglob("*.py"), *(ROOT / "tests").rglob("*.py")])
    key = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    known = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
    if known.get("key") != key:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "pytest", *OPTIONS, "-p", "tests.executed", f"--executed={folder}"]
            subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
            parts = [json.loads(path.read_text()) for path in Path(folder).iterdir()]
        known = {"key": key, "tests": {name: found for part in parts for name, found in part.items()}}
        RECORD.parent.mkdir(exist_ok=True)
        RECORD.write_text(json.dumps(known))
    return known["tests"]


def tests_of(mistake: Mistake, executed: Executed) -> list[str]:
    """The tests that execute what is changed, or else a line of its statement or its file; the quickest first."""
    for span in (*mistake.spans, range(10**6)):
        found = [name for name, (_, files) in executed.items() if any(n in span for n in files.get(mistake.file, ()))]
        if found:
            return sorted(found, key=lambda name: executed[name][0])
    return []


def is_noticed(copy: Copy, mistake: Mistake, tests: Sequence[str], executed: Executed) -> bool:
    """Run ten tests, eight times as many, and so on, until one fails."""
    count = 10
    while tests:
        part, tests, count = tests[:count], tests[count:], 8 * count
        seconds = 60 + int(3 * sum(executed[name][0] for name in part))
        names = [f"../{name}" if name.startswith("minilora/") else name.removeprefix("tests/") for name in part]
        status = copy.run(mistake.file, mistake.source, names, seconds)
        assert status in (0, 1, 2, 4) or status < 0, copy.output  # 2, 4: it cannot be imported; < 0: too slow
        assert "not found: " not in copy.output, copy.output
        if status:
            return True
    return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--where",
        nargs="+",
        default=[*(f"{page}.py" for page in PAGES), "kernels"],
        help="files and folders of minilora",
    )
    parser.add_argument("--only", type=int, nargs="+", help="numbers of mistakes, as this prints them")
    args = parser.parse_args()
    places = [ROOT / "minilora" / name for name in args.where]
    paths = [path for place in places for path in (sorted(place.rglob("*.py")) if place.is_dir() else [place])]
    found = [mutant for path in paths for mutant in mutants(path)]
    chosen = list(enumerate(random.Random(args.seed).sample(found, min(args.count, len(found)))))
    executed, missed = record(), []
    with tempfile.TemporaryDirectory() as folder:
        copy = Copy(Path(folder))
        for number, mistake in chosen:
            if args.only and number not in args.only:
                continue
            tests = tests_of(mistake, executed)
            noticed = is_noticed(copy, mistake, tests, executed)
            missed += [] if noticed else [number]
            print(f"{number:3} {'noticed' if noticed else 'MISSED '} {mistake.change} ({len(tests)} tests)", flush=True)
        copy.close()
    print(f"{len(chosen)} of {len(found)} mistakes, {len(missed)} missed: {missed}")


if __name__ == "__main__":
    main()
