"""A run of 30 steps, resumed from each of them in another place."""

import pytest

from minilora.cli import main
from tests.models import long
from tests.runs import contents, finetune, steps, unfinished

pytestmark = pytest.mark.reliability
STEPS = 30
OPTIONS = {"max_steps": STEPS, "samples": 0, "eval_steps": 7}


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    assert finetune(inputs, out, **OPTIONS, save_steps=1, save_total_limit=99) == 0
    return out


@pytest.mark.parametrize("step", [1, 7, 19, 30, *long(*(i for i in range(2, 30) if i not in (7, 19)))])
def test_a_run_that_was_moved_and_saves_at_other_steps_ends_in_the_same_bytes(inputs, whole, tmp_path, step):
    unfinished(whole, tmp_path / "moved", step)
    assert finetune(inputs, tmp_path / "moved", **OPTIONS, save_steps=4, save_total_limit=1) == 0
    assert contents(tmp_path / "moved") == contents(whole)
    assert steps(tmp_path / "moved") == list(range(1, STEPS + 1))
    assert main(["verify", str(tmp_path / "moved")]) == 0
