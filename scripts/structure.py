"""Print how large the project is to its readers: lines, imports, and the functions that a step and a run go through.

python scripts/structure.py
"""

import ast
import importlib
import io
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import redirect_stderr, redirect_stdout
from inspect import CO_OPTIMIZED
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

PACKAGE = Path(__file__).parents[1] / "minilora"
FOUR_BIT_DORA = ["--quantize=nf4", "--use-dora", "--lora-dropout=0.1", "--gradient-checkpointing=mlp"]
PAGES = ("lora", "nf4", "llama", "adapter", "data", "training")


def modules_of(package: Path) -> dict[str, Path]:
    """Return the modules of a package that are not empty, by their dotted names in it."""
    files = sorted(package.rglob("*.py"))
    return {".".join(each.relative_to(package).with_suffix("").parts): each for each in files if each.stat().st_size}


def lines(paths: Iterable[Path]) -> int:
    """Count the lines of files."""
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def import_statements(path: Path) -> Iterator[Any]:
    """Yield the imports of a file, those within functions too, except for those under TYPE_CHECKING."""
    nodes: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            nodes += node.orelse
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        else:
            nodes += ast.iter_child_nodes(node)


def closure(names: Iterable[str], modules: Mapping[str, Path]) -> set[str]:
    """Return the modules that are imported, directly or not, by the named ones, and these themselves."""
    found, new = set[str](), [name for name in names if name in modules]
    while new:
        found.add(name := new.pop())
        package = modules[name].parents[name.count(".")].name
        for node in import_statements(modules[name]):
            origin = [f"{node.module}"] if isinstance(node, ast.ImportFrom) else []
            imported = [*origin, *(".".join([*origin, alias.name]) for alias in node.names)]
            inner = (each.removeprefix(f"{package}.") for each in imported)
            new += [each for each in inner if each in modules and each not in found]
    return found


def repeated_names(modules: Mapping[str, Path]) -> list[str]:
    """Return the names of functions outside classes that several modules have."""
    trees = (ast.parse(path.read_text(encoding="utf-8")) for path in modules.values())
    names = ({node.name for node in tree.body if isinstance(node, ast.FunctionDef)} for tree in trees)
    counted = Counter(name for each in names for name in each)
    return sorted(name for name, count in counted.items() if count > 1)


class Trace:
    """What is called between `start` and `stop` of a package: its functions, and pairs of them, of which the first one
    called the second, maybe through other packages (final). A lambda belongs to the function that it is in.
    """

    def __init__(self, package: Path):
        self.package = f"{package}/"
        self.functions = set[CodeType]()
        self.moves = set[tuple[CodeType, CodeType]]()

    def start(self) -> None:
        sys.setprofile(self._record)

    def stop(self) -> None:
        sys.setprofile(None)

    def __str__(self) -> str:
        files = {function.co_filename for function in self.functions}
        between = sum(caller.co_filename != called.co_filename for caller, called in self.moves)
        return f"{len(self.functions)} functions, {len(self.moves)} moves ({between} between files), {len(files)} files"

    def _record(self, frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and self._is_function(frame.f_code):
            self.functions.add(frame.f_code)
            caller = frame.f_back
            while caller and not self._is_function(caller.f_code):
                caller = caller.f_back
            if caller and caller.f_code is not frame.f_code:
                self.moves.add((caller.f_code, frame.f_code))

    def _is_function(self, code: CodeType) -> bool:
        is_named = code.co_flags & CO_OPTIMIZED and not code.co_name.startswith("<")  # no body of a module or class
        return bool(is_named) and code.co_filename.startswith(self.package)


def trace_step() -> Trace:
    """Trace `training.train_step` with an adapter of the built-in model."""
    import minilora as ml
    from minilora.data import collate
    from minilora.training import adamw, train_step

    trace, model, tokens = Trace(PACKAGE), ml.load_model("minilora/builtin"), list(range(5, 25))
    ml.attach(model, ml.LoraConfig(target_modules="all-linear"))
    optimizer = adamw([p for p in model.parameters() if p.requires_grad])
    batches = [collate([ml.Example(tokens, tokens)] * 8, next(model.parameters()).device)]
    trace.start()
    train_step(model, optimizer, batches)
    trace.stop()
    return trace


def trace_train() -> Trace:
    """Trace a step in `ml.train` with an adapter of the built-in model, from one call of `on_step` to the next."""
    import minilora as ml

    trace, model, tokens = Trace(PACKAGE), ml.load_model("minilora/builtin"), list(range(5, 25))
    ml.attach(model, ml.LoraConfig(target_modules="all-linear"))

    def on_step(record: Mapping[str, Any]) -> None:
        [trace.start, trace.stop][record["step"] - 1]()

    ml.train(model, [ml.Example(tokens, tokens)] * 8, ml.TrainConfig(max_steps=2, save_steps=0), on_step)
    return trace


def trace_run() -> Trace:
    """Trace `minilora finetune` of the built-in model, with a few steps."""
    from minilora.cli import main

    trace = Trace(PACKAGE)
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        trace.start()
        status = main(["finetune", "--out", f"{folder}/run", "--max-steps", "2"])
        trace.stop()
    assert status == 0, "minilora finetune failed"
    return trace


def trace_pages() -> Trace:
    """Trace what users do: fine-tune, generate and merge, dense and 4-bit, LoRA and DoRA, with kernels and without."""
    import torch

    import minilora as ml
    from minilora.cli import main

    trace = Trace(PACKAGE)
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        rows = Path(folder, "rows.jsonl")
        rows.write_text('{"prompt": "one", "completion": " two"}\n' * 8, encoding="utf-8")
        trace.start()
        short = [f"--data={rows}", "--model=minilora/builtin", "--max-steps=1", "--samples=0", "--general-data=none"]
        for number, flags in enumerate(([], FOUR_BIT_DORA)):
            for plain in ([], ["--plain"]):
                out = f"{folder}/{number}{len(plain)}"
                statuses = [
                    main(["finetune", f"--out={out}", *short, *flags, *plain]),
                    main(["generate", f"--adapter={out}", "--prompt=a", "--max-new-tokens=2", *plain]),
                    main(["merge", f"--adapter={out}", f"--out={out}-merged", *plain]),
                ]
                assert not any(statuses), statuses
        model = ml.load_model("minilora/builtin")
        for name in ("one", "two"):
            ml.attach(model, ml.LoraConfig(target_modules=["q_proj"]), name)
        ml.set_adapter(model, ["one", "two"])
        model(torch.tensor([[1, 2]]))
        with ml.disable_adapter(model):
            model(torch.tensor([[1, 2]]))
        ml.save_adapter(model, f"{folder}/one", "one")
        ml.detach(model)
        ml.load_adapter(model, f"{folder}/one")
        repr(model)
        with ml.plain():
            ml.merge(model)
        ml.save_model(model, f"{folder}/model")
        ml.load_model(f"{folder}/model", quantize="nf4")
        trace.stop()
    return trace


def unentered(trace: Trace) -> dict[str, int]:
    """Return the functions of the six pages that are not in a trace, and the lines of their bodies."""
    entered = {(code.co_filename, code.co_firstlineno) for code in trace.functions}
    found = {}
    for page in PAGES:
        for node in ast.walk(ast.parse((PACKAGE / f"{page}.py").read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
                if (
                    body
                    and (str(PACKAGE / f"{page}.py"), first) not in entered
                    and not ast.unparse(body[0]).startswith("...")
                ):
                    found[f"{page}.{node.name}"] = body[-1].end_lineno - body[0].lineno + 1
    return found


def figures(modules: Mapping[str, Path]) -> Iterator[tuple[str, str]]:
    """Yield what is measured, and the figure."""
    from minilora import plain

    pages = {name: lines([modules[name]] if name in modules else []) for name in PAGES}
    found = closure(PAGES, modules)
    for name in {*modules} - {"__init__", "__main__"}:  # before anything is traced: an import calls functions too
        importlib.import_module(f"minilora.{name}".removesuffix(".__init__"))
    statements = [node for path in modules.values() for node in import_statements(path)]
    loose = [name for name in modules if "." not in name and not name.startswith("__")]
    yield "the six pages: lines", f"{sum(pages.values()):,} ({', '.join(f'{k} {v}' for k, v in pages.items())})"
    yield "with all that they import", f"{len(found)} files, {lines(modules[name] for name in found):,} lines"
    yield "a step of training", f"{trace_step()}"
    with plain():
        yield "the same without kernels", f"{trace_step()}"
    yield "a step in `ml.train`", f"{trace_train()}"
    yield "a whole finetune", f"{trace_run()}"
    left = ", ".join(f"{name} {size}" for name, size in unentered(trace_pages()).items())
    yield "functions of the pages that no run enters, with the lines of their bodies", left
    yield "the package", f"{len(modules)} modules, {lines(modules.values()):,} lines"
    yield "lines of it that are imports", f"{sum(node.end_lineno - node.lineno + 1 for node in statements):,}"
    yield "function names that several modules have", f"{len(repeated_names(modules))}"
    yield "modules beside the folders", f"{len(loose)} ({', '.join(loose)})"


if __name__ == "__main__":
    print("| what | measured |\n|---|---|")
    print(*(f"| {what} | {figure} |" for what, figure in figures(modules_of(PACKAGE))), sep="\n")
