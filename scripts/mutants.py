"""Plant random mistakes in the six pages and the kernels, one at a time, and count those that the tests notice.

    python scripts/mutants.py --count 300 --seed 18 [--only 3 14 15] [--all]

A mistake changes one expression or drops one statement. The tests are those of the core, without those that compile,
until the first failure; the file named like the changed one runs first. With `--all` they are the whole default suite,
which takes minutes where nothing is noticed: use it with `--only` for mistakes that the core's tests missed. The same
tests have to pass without a mistake. Some mistakes change no result, as where a block size is chosen for speed alone.
"""

from __future__ import annotations

import argparse
import ast
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.planting import Copy  # noqa: E402  # the checkout is no installed package

PAGES = ("lora", "nf4", "llama", "adapter", "data", "training")
TESTS = ("kernels", "lora", "nf4", "attention", "loss", "layers", "llama", "cache", "attach", "loop", "batch", "data")
TESTS += ("nf4_laws", "files", "tokens", "copies", "golden", "six_pages")
FIRST = {"adapter": "attach", "training": "loop"}  # the tests of a page that has none of its name
SWAPS = ((ast.Add, ast.Sub), (ast.Mult, ast.Div), (ast.Lt, ast.LtE), (ast.Gt, ast.GtE), (ast.Eq, ast.NotEq))
SWAPS += ((ast.Is, ast.IsNot), (ast.In, ast.NotIn), (ast.And, ast.Or))
OPERATORS = {ast.FloorDiv: ast.Div, **dict(SWAPS), **{right: left for left, right in SWAPS}}


def expressions(tree: ast.AST) -> Iterator[ast.expr | ast.stmt]:
    """Every expression and statement but those of annotations, decorators, error messages and docstrings."""
    for name, value in ast.iter_fields(tree):
        if name in ("annotation", "returns", "decorator_list") or isinstance(tree, ast.Raise | ast.ImportFrom):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.expr | ast.stmt):
                yield child
            if isinstance(child, ast.AST):
                yield from expressions(child)


def changed(node: ast.expr | ast.stmt) -> str | None:
    """The source of the node with a mistake, or None if there is none to make."""
    match node:
        case ast.BinOp(op=op) | ast.BoolOp(op=op) | ast.AugAssign(op=op) if type(op) in OPERATORS:
            node.op = OPERATORS[type(op)]()
        case ast.Compare(ops=[op]):
            node.ops = [OPERATORS[type(op)]()]
        case ast.Constant(value=bool(value)):
            return str(not value)
        case ast.Constant(value=int(value) | float(value)):
            return repr(value + 1)
        case ast.UnaryOp(op=ast.USub() | ast.Not(), operand=operand):
            return f"({ast.unparse(operand)})"
        case ast.IfExp(body=body):
            return f"({ast.unparse(body)})"
        case ast.Expr(value=ast.Call()):
            return "pass"
        case _:
            return None
    return ast.unparse(node) if isinstance(node, ast.stmt) else f"({ast.unparse(node)})"


def mutants(path: Path) -> Iterator[tuple[str, str, str]]:
    """Each mistake in a file: the file, what it changes, and the source of the whole file with it."""
    file, text = path.relative_to(ROOT / "minilora").as_posix(), path.read_text(encoding="utf-8")
    lines = text.encode().splitlines(keepends=True)
    for node in expressions(ast.parse(text)):
        begin = len(b"".join(lines[: node.lineno - 1])) + node.col_offset
        end = len(b"".join(lines[: node.end_lineno - 1])) + node.end_col_offset
        if (mutated := changed(node)) is not None:
            before, after = (" ".join(part.split())[:60] for part in (text.encode()[begin:end].decode(), mutated))
            source = (text.encode()[:begin] + mutated.encode() + text.encode()[end:]).decode()
            yield file, f"{file}:{node.lineno}: {before} -> {after}", source


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="+", help="numbers of mistakes, as this prints them")
    parser.add_argument("--all", action="store_true", help="run the whole default suite")
    args = parser.parse_args()
    paths = [ROOT / "minilora" / f"{page}.py" for page in PAGES] + sorted((ROOT / "minilora/kernel").glob("*.py"))
    found = [mutant for path in paths for mutant in mutants(path)]
    chosen = list(enumerate(random.Random(args.seed).sample(found, args.count)))
    chosen = [(number, mutant) for number, mutant in chosen if not args.only or number in args.only]
    missed = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Copy(Path(folder))

        def status_of(file: str, source: str) -> int:
            first = [Path(file).stem, FIRST.get(Path(file).stem), "kernels" if "kernel" in file else "six_pages"]
            core = [f"test_{name}.py" for name in sorted(TESTS, key=lambda name: name not in first)]
            core += [f"../minilora/{file}", "-knot compil"]  # and its doctests
            return copy.run(file, source, ["--ignore=tests/test_planted.py"] if args.all else core, seconds=900)

        assert status_of("lora.py", paths[0].read_text(encoding="utf-8")) == 0, copy.output
        for number, (file, change, source) in chosen:
            status = status_of(file, source)
            assert status in (0, 1, 2, 4) or status < 0, copy.output  # 2, 4: it cannot be imported; < 0: too slow
            missed += [] if status else [number]
            print(f"{number:3} {'noticed' if status else 'MISSED '} {change}", flush=True)
        copy.close()
    print(f"{len(chosen)} mistakes, {len(missed)} missed: {missed}")


if __name__ == "__main__":
    main()
