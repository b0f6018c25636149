"""Files in which something was changed are read or refused: no other error, no hang, no growth."""

from pathlib import Path

import pytest

from tests.models import long
from tests.reliability.watch import figures, watched

pytestmark = pytest.mark.reliability
LONG = {"structure": 20_000, "bytes": 20_000, "json": 10_000, "data": 2_000}
SHORT = {kind: count // 100 for kind, count in LONG.items()}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures memory by Linux's /proc")
@pytest.mark.parametrize("counts", [SHORT, *long(*({kind: count} for kind, count in LONG.items()))], ids=str)
def test_a_changed_file_is_read_or_refused(counts, tmp_path, capsys):
    words = (f"{kind}={count}" for kind, count in counts.items())
    found = watched("tests.reliability.mutants:calls", str(tmp_path), *words)
    with capsys.disabled():
        print(f"\n{', '.join(counts)}: {figures(found)}")
    assert not [each.problem for each in found if each.problem]
    assert len(found) >= sum(counts.values())
    assert 0.2 < sum(each.outcome == "refused" for each in found) / len(found) < 1  # most changes matter, and not all


def test_a_process_that_dies_is_a_problem(tmp_path):
    found = watched("tests.reliability.mutants:calls", str(tmp_path), "nothing=1")
    assert "died with 1" in found[-1].problem
