"""Plant random mistakes in the core, one at a time, and count those that the tests notice.

    python scripts/mutants.py --count 100 --seed 0 [--only 3 14 15] [--all]

A mistake changes one expression or drops one statement. The tests are those of the core until the first failure, and
the file with the name of the changed one comes first, or that of the kernels. With `--all` they are the whole default
suite, which takes minutes where nothing is noticed: use it with `--only` for mistakes that the core's tests missed. The
same tests have to pass without a mistake. Some mistakes change no result, as where a size of blocks is chosen for speed
alone.
"""

from __future__ import annotations

import argparse
import ast
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.planting import Copy  # noqa: E402  # the checkout is no installed package

CORE = ("lora", "nf4", "llama", "adapter", "data", "training")
CORE += (
    "kernel/lora",
    "kernel/nf4",
    "kernel/attention",
    "kernel/llama",
)
TESTS = ("kernels", "lora", "nf4", "attention", "loss", "layers", "llama", "cache", "attach", "six_pages", "loop")
TESTS += ("batch", "data", "files", "tokens", "parameters", "serve", "golden")
SWAPS = ((ast.Add, ast.Sub), (ast.Mult, ast.Div), (ast.Lt, ast.LtE), (ast.Gt, ast.GtE), (ast.Eq, ast.NotEq))
SWAPS += ((ast.Is, ast.IsNot), (ast.In, ast.NotIn), (ast.And, ast.Or))
OPERATORS = {ast.FloorDiv: ast.Div, **dict(SWAPS), **{right: left for left, right in SWAPS}}


class Mutant(NamedTuple):
    file: str
    line: int
    original: str
    mutated: str
    source: str  # of the whole file with the mistake


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


def mutants(file: str, text: str) -> Iterator[Mutant]:
    lines = text.splitlines(keepends=True)
    starts = [sum(len(line.encode()) for line in lines[:i]) for i in range(len(lines))]
    for node in expressions(ast.parse(text)):
        begin, end = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
        source = text.encode()
        original = source[begin:end].decode()
        if (mutated := changed(node)) is not None:
            whole = (source[:begin] + mutated.encode() + source[end:]).decode()
            yield Mutant(file, node.lineno, original, mutated, whole)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="+", help="numbers of mistakes, as this prints them")
    parser.add_argument("--all", action="store_true", help="run the whole default suite")
    args = parser.parse_args()
    found = []
    for name in CORE:
        found += mutants(f"{name}.py", (ROOT / "minilora" / f"{name}.py").read_text(encoding="utf-8"))
    chosen = list(enumerate(random.Random(args.seed).sample(found, args.count)))
    chosen = [(number, mutant) for number, mutant in chosen if not args.only or number in args.only]
    missed = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Copy(Path(folder))
        rest = ["", "--ignore=tests/test_planted.py"] if args.all else []

        def status_of(file: str, source: str) -> int:
            first = "kernels" if file.startswith("kernel/") else Path(file).stem
            tests = [f"test_{name}.py" for name in sorted(TESTS, key=lambda name: name != first)]
            return copy.run(file, source, [*tests, *rest], seconds=900)

        own = f"{CORE[0]}.py"
        assert status_of(own, (ROOT / "minilora" / own).read_text(encoding="utf-8")) == 0, copy.output
        for number, mutant in chosen:
            status = status_of(mutant.file, mutant.source)
            assert status in (0, 1, 2) or status < 0, copy.output  # 2: the module cannot be imported; < 0: too slow
            missed += [] if status else [number]
            before, after = (" ".join(text.split())[:60] for text in (mutant.original, mutant.mutated))
            print(
                f"{number:3} {'noticed' if status else 'MISSED '} {mutant.file}:{mutant.line}: {before} -> {after}",
                flush=True,
            )
        copy.close()
    print(f"{len(chosen)} mistakes, {len(missed)} missed: {missed}")


if __name__ == "__main__":
    main()
