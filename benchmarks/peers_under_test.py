"""Check other libraries with `minilora.testing`, and write peers_under_test.md beside this file.

    A/bin/python -m benchmarks.peers_under_test --json a.json --peers peft trl
    B/bin/python -m benchmarks.peers_under_test --json b.json --peers litgpt
    python -m benchmarks.peers_under_test a.json b.json

Some peers exclude each other, so each interpreter checks those that it can import. It needs what minilora needs, but
not minilora itself.
"""

import argparse
import importlib
import importlib.metadata
import json
import platform
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.peer_table import BUILT, JUDGED, LESS, MODULES, OTHER, PEERS, Entry

PAGE = Path(__file__).with_suffix(".md")
FINDINGS = PAGE.parents[1] / "docs" / "findings"


@dataclass(frozen=True)
class Result:
    """What a law found of an entry: verdict "passes", "fails" or "does not apply"."""

    peer: str
    kind: str
    what: str
    law: str
    verdict: str
    message: str = ""
    causes: Sequence[str] = ()

    @property
    def cause(self) -> str:
        """The likely causes, or else the line of the message that says what was found."""
        lines = [line.strip() for line in self.message.splitlines()]
        return "; ".join(self.causes) or next((line for line in lines[3:4]), self.message)


def check_entry(entry: Entry) -> Iterable[Result]:
    """Try every law of an entry's kind."""
    from minilora.testing import CheckFailure, NotApplicable, check_trains_everything, laws

    with tempfile.TemporaryDirectory() as folder:
        given = (folder,) if entry.kind == "adapter_directory" else ()
        is_made = given or entry.kind in BUILT
        implementation = entry.implementation(*given) if is_made else entry.implementation
        for name, law in {"everything": None}.items() if entry.kind == "step" else laws(entry.kind).items():
            begin = (entry.peer, entry.kind, entry.what, name)
            try:
                if law is None:
                    check_trains_everything(*implementation)
                elif not (cases := [*filter(entry.only, law.cases)]):
                    raise NotApplicable("no case is one that it is made for")
                else:
                    replace(law, cases=cases).check(implementation)
                yield Result(*begin, "passes")
            except NotApplicable as reason:
                yield Result(*begin, "does not apply", message=str(reason))
            except CheckFailure as failure:
                yield Result(*begin, "fails", message=str(failure).replace(folder, "FOLDER"), causes=failure.causes)


def state_of(peer: str) -> str:
    """Return the version, or why it cannot be imported, in parentheses."""
    try:
        importlib.import_module(MODULES[peer])
    except Exception as error:
        return f"({error})"
    return importlib.metadata.version(peer)


def check_here(peers: Sequence[str]) -> dict[str, Any]:
    """Check those of the peers that this interpreter can import."""
    warnings.simplefilter("ignore")
    states = {peer: state_of(peer) for peer in peers}
    entries = [entry for entry in PEERS if states.get(entry.peer, "(")[0] != "("]
    results = [asdict(result) for entry in entries for result in check_entry(entry)]
    return {"states": states, "results": results, "python": _versions()}


def _versions() -> str:
    names = ("torch", "numpy", "transformers")
    found = [each.metadata["Name"] for each in importlib.metadata.distributions()]
    versions = [f"{name} {importlib.metadata.version(name)}" for name in names if name in found]
    return f"Python {platform.python_version()}, {', '.join(versions)}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Check other libraries and write the page.")
    parser.add_argument("found", nargs="*", type=Path, help="what --json wrote; the page is made of all of them")
    parser.add_argument("--json", type=Path, help="check what this interpreter has, into a file")
    parser.add_argument("--peers", nargs="+", default=list(MODULES), help="those to be checked")
    arguments = parser.parse_args()
    if arguments.json:
        arguments.json.write_text(json.dumps(check_here(arguments.peers)), "utf-8")
    else:
        PAGE.write_text(page([json.loads(file.read_text("utf-8")) for file in arguments.found]), "utf-8")


# --- the page ---

HEAD = """# Other libraries, checked with `minilora.testing`

| peer | right | wrong | less precise | another convention |
| --- | --- | --- | --- | --- |
{rows}

Two more findings about PEFT come from checks of a whole model: [a deleted adapter is still
active](../docs/findings/peft-deleted-adapter.md), and [merges drift](../docs/findings/peft-merge-drift.md).

*Wrong* is a result that nobody means; each has a page that shows it without minilora. *Less precise* is rounding.
*Another convention* is a choice of the library or of a model's template, mostly a documented one. Behind each
name stand the laws that pass, of those that apply. What is said of a library is said of this version, on a CPU, of what
a check found by calling its own code: `benchmarks/peer_table.py` has the callables (`PEERS`) and our judgements
(`JUDGED`).

{missing}`python -m benchmarks.peers_under_test` wrote this page: {versions}; {machine}."""


def page(runs: list[dict[str, Any]]) -> str:
    """Return the page of what several interpreters found."""
    states = dict.fromkeys(MODULES, "") | {peer: state for run in runs for peer, state in run["states"].items()}
    states |= {peer: state for run in reversed(runs) for peer, state in run["states"].items() if state[0] != "("}
    results = [Result(**each) for run in runs for each in run["results"]]
    rows = [_row(peer, state, results) for peer, state in states.items() if state[0] != "("]
    missing = [f"Not installed: {peer} {state}.\n\n" for peer, state in states.items() if state[0] == "("]
    versions = "; ".join(dict.fromkeys(run["python"] for run in runs))
    machine = f"{platform.system()} {platform.machine()}"
    return HEAD.format(rows="\n".join(rows), missing="".join(missing), versions=versions, machine=machine) + "\n"


def _row(peer: str, version: str, results: list[Result]) -> str:
    findings = {what: link for file in FINDINGS.glob("*.md") for what, link in _finding(file)}
    cells: dict[str, list[str]] = {"right": [], "wrong": [], LESS: [], OTHER: []}
    for entry in PEERS:
        own = [each for each in results if (each.peer, each.kind, each.what) == (peer, entry.kind, entry.what)]
        own = [each for each in own if each.verdict != "does not apply"]
        failed = [each for each in own if each.verdict == "fails"]
        if entry.peer != peer or not own:
            continue
        name = f"{entry.what} ({len(own) - len(failed)} of {len(own)})"
        if not failed:
            cells["right"].append(name.replace(f" of {len(own)}", ""))
            continue
        verdict, found = JUDGED.get(f"{peer} {entry.what}") or ("wrong", findings.get(f"{peer} {entry.what}"))
        cells[verdict].append(f"{name}: {found or failed[0].cause}")
    texts = [", ".join(cells["right"]), *("<br>".join(cells[verdict]) for verdict in ("wrong", LESS, OTHER))]
    return f"| {peer} {version} | {' | '.join(texts)} |"


def _finding(file: Path) -> list[tuple[str, str]]:
    """Return the entries that a page is about, which its first line names, each with a link by the title."""
    first, _, title, *_ = file.read_text("utf-8").splitlines()
    link = f"[{title[2:]}](../docs/findings/{file.name})"
    return [(what, link) for what in first.removeprefix("<!-- ").removesuffix(" -->").split("; ")]


if __name__ == "__main__":
    main()
