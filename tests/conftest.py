import os
from contextlib import nullcontext
from functools import cache

import pytest
import torch
from hypothesis import Phase, settings

import minilora as ml
from tests.runs import runner, write_inputs
from tests.text import write_tokenizer

collect_ignore_glob = ["golden/make_*.py"]  # scripts, which need the extra `parity`
settings.register_profile("default", max_examples=10, deadline=None, derandomize=True, print_blob=True)
settings.register_profile("find", settings.get_profile("default"), phases=(Phase.explicit, Phase.generate))
settings.load_profile("default")
THREADS = int(os.environ.get("OMP_NUM_THREADS", "1"))  # tiny tensors gain nothing from more
torch.set_num_threads(THREADS)


def pytest_addoption(parser):
    parser.addoption("--part", metavar="K/N", help="every N-th of the selected tests, from the K-th on (from 0)")
    parser.addoption("--examples", type=int, metavar="N", help="draw N examples of each property, instead of 10")
    parser.addoption("--plain", action="store_true", help="compute as the definitions say, without kernels")


def pytest_configure(config):
    if count := config.getoption("--examples"):
        settings.register_profile("counted", max_examples=count)
        settings.load_profile("counted")


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist, for `-n auto`
def pytest_xdist_auto_num_workers():
    return min(8, os.cpu_count())  # each imports PyTorch


@pytest.hookimpl(trylast=True)  # after the selection by markers
def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("parity") or item.get_closest_marker("real"):
            item.add_marker(pytest.mark.filterwarnings("default"))  # the peers' own warnings are no failures of ours
    if part := config.getoption("--part"):
        first, step = map(int, part.split("/"))
        chosen = items[first::step]
        del items[first::step]
        config.hook.pytest_deselected(items=list(items))
        items[:] = chosen


@pytest.fixture(autouse=True)
def _same_everywhere():
    """Draw the same numbers in each test, whatever ran before it, a peer's own numbers included."""
    torch.default_generator.manual_seed(0)
    torch.set_num_threads(THREADS)


@pytest.fixture(scope="session", autouse=True)
def _plain(request):
    """Switch all kernels off, if that is asked for."""
    with ml.plain() if request.config.getoption("--plain") else nullcontext():
        yield


@pytest.fixture(autouse=True)
def _kernels(request):
    """With the parameter "plain" the definitions alone; see `tests.models.either`."""
    with ml.plain() if getattr(request, "param", None) == "plain" else nullcontext():
        yield


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """A function that returns the tokenizer of `tests.text` with these options; each is made once."""

    @cache
    def make(**options):
        return write_tokenizer(tmp_path_factory.mktemp("tokenizer"), **options)

    return make


@pytest.fixture(scope="session")
def directory(tmp_path_factory):
    """A model and rows, see `tests.runs.write_inputs`, where a module has no `directory` of its own."""
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def run(directory, capsys, monkeypatch):
    """A function that runs a command in `directory`; see `tests.runs.runner`."""
    return runner(directory, capsys, monkeypatch)
