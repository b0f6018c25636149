"""Check the LoRA of other libraries with `minilora.testing`, and write peers_under_test.md beside this file.

    python -m benchmarks.peers_under_test --python A/bin/python --python B/bin/python

Each interpreter checks the peers that it can import, since some exclude each other. It needs what minilora needs, but
not minilora itself.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.peer_table import KINDS, MODULES, PEERS, Entry

PAGE = Path(__file__).with_suffix(".md")


@dataclass(frozen=True)
class Result:
    """What a law found of an entry: verdict "passes", "fails" or "does not apply"."""

    peer: str
    kind: str
    what: str
    law: str
    verdict: str
    ratio: float = 0.0
    message: str = ""
    causes: Sequence[str] = ()

    @property
    def cause(self) -> str:
        """The likely causes, or else the line of the message that says what was found."""
        lines = [line.strip() for line in self.message.splitlines()]
        return "; ".join(self.causes) or next((line for line in lines[3:4]), self.message)


def check_entry(entry: Entry) -> Iterable[Result]:
    """Try every law of an entry's kind."""
    from minilora.testing import CheckFailure, NotApplicable, laws

    with tempfile.TemporaryDirectory() as folder:
        is_directory = entry.kind == "adapter_directory"
        implementation = entry.implementation(folder) if is_directory else entry.implementation
        for name, law in laws(entry.kind).items():
            begin, cases = (entry.peer, entry.kind, entry.what, name), [*filter(entry.only, law.cases)]
            try:
                if not cases:
                    raise NotApplicable("no case is one that it is made for")
                yield Result(*begin, "passes", replace(law, cases=cases).check(implementation).ratio)
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
    names = ("torch", "numpy", "transformers", "torchao")
    found = [each.metadata["Name"] for each in importlib.metadata.distributions()]
    versions = [f"{name} {importlib.metadata.version(name)}" for name in names if name in found]
    return f"Python {platform.python_version()}, {', '.join(versions)}"


def check_in(interpreters: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Run `check_here` in other interpreters, each for the peers that those before it do not have."""
    missing = list(MODULES)
    for interpreter in interpreters:
        with tempfile.TemporaryDirectory() as folder:  # in which some peers write caches
            file = Path(folder) / "found.json"
            command = [interpreter, "-m", __spec__.name, "--json", str(file), *missing]
            subprocess.run(command, check=True, cwd=folder, env={**os.environ, "PYTHONPATH": str(PAGE.parents[1])})
            found = json.loads(file.read_text("utf-8"))
        missing = [peer for peer in missing if found["states"][peer][0] == "("]
        yield found


def main() -> None:
    parser = argparse.ArgumentParser(description="Check other libraries and write the page.")
    parser.add_argument("peers", nargs="*", default=list(MODULES), help="those to be checked, with --json")
    parser.add_argument("--python", action="append", default=[], help="an interpreter that has some of the peers")
    parser.add_argument("--json", help="check what this interpreter has, into a file")
    arguments = parser.parse_args()
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(check_here(arguments.peers)), "utf-8")
    else:
        PAGE.write_text(page(list(check_in(arguments.python or [sys.executable]))), "utf-8")


# --- the page ---

HEAD = """# Other libraries, checked with `minilora.testing`

{versions}; {machine}.

`python -m benchmarks.peers_under_test` writes this page. What is said of a library is said of the version in the table,
and of what a check found by calling its own code: `PEERS` in `benchmarks/peer_table.py` has every callable.

A cell has, of each thing that is checked, the laws that pass of those that apply, and the largest error of those that
pass over its derived bound: 1 is the limit. A cell is empty where a library has nothing of that kind."""
REPEAT = """Each message says how to repeat it; `implementation` is that of the same entry of `PEERS`."""


def page(runs: list[dict[str, Any]]) -> str:
    """Return the page of what several interpreters found."""
    states = dict.fromkeys(MODULES, "") | {peer: state for run in runs for peer, state in run["states"].items()}
    states |= {peer: state for run in reversed(runs) for peer, state in run["states"].items() if state[0] != "("}
    results = [Result(**each) for run in runs for each in run["results"]]
    versions = "; ".join(dict.fromkeys(run["python"] for run in runs))
    parts = [HEAD.format(versions=versions, machine=f"{platform.system()} {platform.machine()}")]
    parts += ["## Summary", *_summary(states, results), "## What fails", *_failures(results)]
    return "\n\n".join(parts) + "\n"


def _summary(states: dict[str, str], results: list[Result]) -> list[str]:
    rows = [["peer", "version", *KINDS]]
    for peer, state in states.items():
        if state[0] != "(":
            own = [[each for each in results if (each.peer, each.kind) == (peer, kind)] for kind in KINDS]
            rows.append([peer, state, *map(_cell, own)])
    missing = [f"- {peer}: not installed {state}" for peer, state in states.items() if state[0] == "("]
    return [_table(rows), *(["\n".join(missing)] if missing else [])]


def _cell(results: list[Result]) -> str:
    cells = []
    for what in dict.fromkeys(each.what for each in results):
        own = [each for each in results if each.what == what and each.verdict != "does not apply"]
        ratios = [each.ratio for each in own if each.verdict == "passes"]
        count = f"{len(ratios)} of {len(own)}"
        count = count if len(ratios) == len(own) else f"**{count}**"
        cells.append(f"{what}: {count}" + (f" ({max(ratios):.2g})" if ratios else ""))
    return "<br>".join(cells)


def _failures(results: list[Result]) -> list[str]:
    """Return the table of what fails, a line for each cause, and then every message."""
    notes = {(entry.peer, entry.kind, entry.what): entry.note for entry in PEERS}
    failed = [each for each in results if each.verdict == "fails"]
    by_cause: dict[tuple[str, ...], list[str]] = {}
    for each in failed:
        note = notes[each.peer, each.kind, each.what]
        by_cause.setdefault((each.peer, each.what, each.cause, note), []).append(f"{each.kind}-{each.law}")
    rows = [["peer", "what", "laws", "likely cause, or what is found", "note"]]
    rows += [[peer, what, ", ".join(ids), cause, note] for (peer, what, cause, note), ids in by_cause.items()]
    parts = [_table(rows), "## Every failure", REPEAT]
    for each in failed:
        parts += [f"### {each.peer}, {each.what}: {each.kind}-{each.law}", f"```text\n{each.message}\n```"]
    return parts


def _table(rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return "\n".join([lines[0], "| --- " * len(rows[0]) + "|", *lines[1:]])


if __name__ == "__main__":
    main()
