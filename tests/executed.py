"""Record which lines of minilora each test executes, and its seconds: a plugin of pytest, for `scripts/mutants.py`.

    pytest -p tests.executed --executed FOLDER

Each process writes {test: [seconds, {file: [line, …]}]} to a file in the folder. What a fixture executes while it is
set up counts for all tests that have it. Not counted are other processes, and what a test finds in a cache.
"""

import json
import os
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path

import pytest

PACKAGE = f"{Path(__file__).parents[1] / 'minilora'}{os.sep}"
FOUND: dict[str, tuple[float, dict[str, list[int]]]] = {}
FIXTURES = defaultdict(set)  # the lines of each
lines: set[tuple[str, int]] = set()  # of the test or the fixture that is at work


def trace(frame, event, argument):
    if not frame.f_code.co_filename.startswith(PACKAGE):
        return None
    lines.add((frame.f_code.co_filename, frame.f_lineno))
    return trace


def pytest_addoption(parser):
    parser.addoption("--executed", metavar="FOLDER", type=Path, required=True)


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef):
    global lines
    outer, lines = lines, set()
    try:
        return (yield)
    finally:
        FIXTURES[fixturedef] |= lines
        lines |= outer


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    global lines
    lines, began = set(), time.perf_counter()
    threading.settrace(trace)
    sys.settrace(trace)
    try:
        return (yield)
    finally:
        sys.settrace(None)
        threading.settrace(None)
        seconds, files = time.perf_counter() - began, defaultdict(list)
        fixtures = (each for named in item._fixtureinfo.name2fixturedefs.values() for each in named)
        for file, line in sorted(lines.union(*(FIXTURES[each] for each in fixtures))):
            files[file.removeprefix(PACKAGE)].append(line)
        FOUND[item.nodeid] = seconds, files


def pytest_sessionfinish(session):
    if FOUND:
        name = os.environ.get("PYTEST_XDIST_WORKER", "all")
        (session.config.getoption("--executed") / f"{name}.json").write_text(json.dumps(FOUND))
