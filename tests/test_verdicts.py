"""The rule of verdicts: intervals over seeds and rows, and the word that follows from one."""

import random
import runpy
from pathlib import Path

import pytest

RECORD = runpy.run_path(str(Path(__file__).parents[1] / "tutorials" / "experiments" / "record.py"))
paired_interval, verdict, p_value = RECORD["paired_interval"], RECORD["verdict"], RECORD["p_value"]


@pytest.mark.parametrize(
    ("expected", "more", "word"),
    [
        ("above", 0.3, "reproduced"),
        ("above", 0.1, "undecided"),
        ("above", -0.3, "not reproduced"),
        ("below", -0.3, "reproduced"),
        ("below", 0.3, "not reproduced"),
        ("equal", 0.1, "reproduced"),
        ("equal", -0.1, "reproduced"),
        ("equal", -0.5, "undecided"),
        ("equal", -0.8, "not reproduced"),
    ],
)
def test_a_difference_excludes_zero_and_an_equality_lies_inside_its_margin(expected, more, word):
    assert verdict(expected, more, half=0.2, margin=0.5) == word


def test_no_difference_proves_an_equality_without_a_narrow_interval():
    assert verdict("equal", 0.0, half=0.6, margin=0.5) == "undecided"


@pytest.mark.parametrize(("seed_noise", "row_noise"), [(1.0, 1.0), (0.0, 1.0), (1.0, 0.0), (0.1, 3.0)])
def test_the_interval_misses_the_truth_in_at_most_one_case_of_twenty(seed_noise, row_noise):
    draw, truth, missed, cases = random.Random(0), 0.5, 0, 1000
    for _ in range(cases):
        rows = [draw.gauss(0, row_noise) for _ in range(20)]
        ones = [[truth + seed + row + draw.gauss(0, 0.3) for row in rows] for seed in draw_seeds(draw, seed_noise)]
        mean, half = paired_interval(ones, [[0.0] * 20] * 3)
        missed += abs(mean - truth) > half
    assert missed / cases < 0.05 + 4 * (0.05 * 0.95 / cases) ** 0.5  # four standard errors of the share


@pytest.mark.parametrize(("expected", "margin"), [("above", 0.0), ("equal", 0.5)])
@pytest.mark.parametrize("seeds", [2, 3, 4, 5, 8])
def test_p_is_below_one_in_twenty_where_the_verdict_is_decided(expected, margin, seeds):
    for more in (-2.0, -0.8, -0.65, -0.45, -0.25, -0.1, 0.0, 0.1, 0.25, 0.45, 0.65, 0.8, 2.0):
        assert (p_value(more, 0.2, seeds, margin) < 0.05) == (verdict(expected, more, 0.2, margin) != "undecided")


def draw_seeds(draw, noise):
    return [draw.gauss(0, noise) for _ in range(3)]


def test_what_two_methods_share_cancels():
    ones = [[1.0, 5.0, 9.0], [2.0, 6.0, 10.0]]
    mean, half = paired_interval(ones, [[value - 0.25 for value in rows] for rows in ones])
    assert (mean, half) == pytest.approx((0.25, 0.0))
