"""Plant random mistakes in the core, one at a time, and count those that the tests notice.

    python scripts/mutants.py --count 100 --seed 0 [--root CHECKOUT] [--only 3 14 15]

A mistake changes one expression or drops one statement. The tests are those of the core, each file until its first
failure, and the file that bears the name of the changed one first; what is not noticed is printed. A mistake may also
be none: some changes leave every result as it was.
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

CORE = ("lora/functional", "lora/layers", "lora/attach", "quant/nf4", "quant/linear")
CORE += ("model/ops", "model/attention", "model/llama", "train/loop")
TESTS = ("functional", "ops", "attention", "nf4", "nf4_linear", "layers", "bases", "dora", "llama", "cache", "attach")
TESTS += ("loop", "flat", "optimizer", "foreign", "state", "select", "evaluate", "tokens", "parameters", "serve")
TESTS += ("quant_files", "files", "merging", "golden", "generate", "classifier", "run")
SWAPS = ((ast.Add, ast.Sub), (ast.Mult, ast.Div), (ast.Lt, ast.LtE), (ast.Gt, ast.GtE), (ast.Eq, ast.NotEq))
SWAPS += ((ast.Is, ast.IsNot), (ast.In, ast.NotIn), (ast.And, ast.Or))
OPERATORS = {ast.FloorDiv: ast.Div, **dict(SWAPS), **{right: left for left, right in SWAPS}}


class Mutant(NamedTuple):
    file: str
    line: int
    right: str
    wrong: str
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
        right = source[begin:end].decode()
        if (wrong := changed(node)) is not None:
            yield Mutant(file, node.lineno, right, wrong, (source[:begin] + wrong.encode() + source[end:]).decode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--root", type=Path, default=ROOT, help="another checkout, whose tests are run")
    parser.add_argument("--only", type=int, nargs="+", help="numbers of mistakes, as this prints them")
    args = parser.parse_args()
    found = []
    for name in CORE:
        found += mutants(f"{name}.py", (ROOT / "minilora" / f"{name}.py").read_text(encoding="utf-8"))
    chosen = list(enumerate(random.Random(args.seed).sample(found, args.count)))
    missed = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Copy(Path(folder), args.root)
        for number, mutant in chosen:
            if args.only and number not in args.only:
                continue
            first = Path(mutant.file).stem.replace("linear", "nf4_linear")
            tests = [f"test_{name}.py" for name in sorted(TESTS, key=lambda name: name != first)]
            is_noticed = copy.run(mutant.file, mutant.source, tests, seconds=900) != 0
            missed += [] if is_noticed else [number]
            print(
                f"{number:3} {'noticed' if is_noticed else 'MISSED '} {mutant.file}:{mutant.line}: "
                f"{' '.join(mutant.right.split())[:60]} -> {' '.join(mutant.wrong.split())[:60]}",
                flush=True,
            )
        copy.close()
    print(f"{len(chosen) if not args.only else len(args.only)} mistakes, {len(missed)} missed: {missed}")


if __name__ == "__main__":
    main()
