"""The benchmark of two processes: what it counts, and what it refuses. It starts no process here."""

import subprocess

import pytest

from benchmarks import scale_peers
from benchmarks.scale_peers import HEAD, SIDES, Turn


def turns(*seconds):
    return [Turn({"loss": 2.0, "last loss": 1.0}, list(each), [2 * 10**9, 10**9]) for each in seconds]


def test_a_row_has_medians_of_all_steps_and_a_ratio_of_each_round():
    row = scale_peers.row(SIDES[1], turns([1, 1, 9], [2, 2, 2]), turns([1, 1, 1], [4, 4, 9]), tokens=100)
    assert len(row) == len(HEAD)
    assert row[1:6] == ["2 × 1", "50", "1.50 (1.00 to 2.00)", "2.00, 1.00 GB", "3.00 GB"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_side_is_refused_that_fails_or_computes_something_else(dtype, tmp_path, monkeypatch):
    started = []

    def turn(side, folder, dtype):
        started.append(side)
        if side == SIDES[3]:
            raise subprocess.CalledProcessError(7, "torchrun")
        return Turn({"loss": 2.0, "last loss": 1.01 if side == SIDES[4] else 1.0}, [1.0, 1.0], [1])

    monkeypatch.setattr(scale_peers, "turn", turn)
    taken, refused = scale_peers.measured(tmp_path, dtype, rounds=2)
    assert refused.keys() == {SIDES[3], SIDES[4]}
    assert "7" in refused[SIDES[3]]
    assert "last loss" in refused[SIDES[4]]
    assert [len(taken[side]) for side in SIDES] == [2, 2, 2, 0, 1, 2]
    assert started[6] == SIDES[1]  # another one begins the second round
