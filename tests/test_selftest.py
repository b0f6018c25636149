"""`minilora selftest`: every law holds here, and a broken kernel or definition is told."""

from dataclasses import replace

import pytest
import torch

from minilora import lora
from minilora.cli import main
from minilora.cli.selftest import kernel_checks
from minilora.definition import WITH_KERNEL
from minilora.files import read_json
from minilora.testing import CheckFailure, laws
from tests.models import long


def some_cases(step):
    """All laws, each with some of its cases."""
    return lambda *kinds: {name: replace(law, cases=law.cases[::step]) for name, law in laws(*kinds).items()}


@pytest.mark.parametrize(
    ("dtype", "step"), [("float32", 7), *long(*((each, 1) for each in ("float64", "float32", "bfloat16", "float16")))]
)
def test_every_law_holds_on_this_machine(dtype, step, monkeypatch, capsys):
    monkeypatch.setattr("minilora.cli.selftest.laws", some_cases(step))
    assert main(["selftest", "--device", "cpu", "--dtype", dtype]) == 0
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines() if line.endswith("holds")]
    assert len(rows) > 50
    assert all(0 <= float(ratio) <= 1 for row in rows for ratio in row[-3:-1])
    assert "BROKEN" not in printed
    assert "largest error / derived bound; 1 is the limit" in printed
    assert printed.endswith("\nall laws hold\n")
    assert ("nf4-nearest (float32)" in printed) == (dtype != "float32")
    for law in ("lora-gradients", "dora-forward", "nf4-nearest", "kernel-causal_attention"):
        assert law in printed


def test_a_broken_kernel_is_told_with_its_law_and_the_definitions_hold(monkeypatch, capsys, tmp_path):
    own = lora.lora_linear
    monkeypatch.setattr(own, "kernel", lambda x, base, bias, A, B, scale: own.function(x, base, bias, A, B, 1.0))
    monkeypatch.setattr("minilora.cli.selftest.kernel_checks", lambda device, dtype: {})
    monkeypatch.setattr("minilora.cli.selftest.laws", lambda *kinds: {"forward": laws("lora")["forward"]})
    assert main(["selftest", "--device", "cpu", "--json", str(tmp_path / "cpu.json")]) == 1
    printed = capsys.readouterr().out
    assert "likely cause: the scale is missing" in printed
    row = next(line for line in printed.splitlines() if line.startswith("lora-forward"))
    assert row.split()[2:] == ["inf", "BROKEN"]
    assert float(row.split()[1]) <= 1
    found = read_json(tmp_path / "cpu.json")
    assert {"versions", "system", "device", "dtype"} < found.keys()
    assert [(each["law"], each["kernels"], each["holds"]) for each in found["rows"]] == [("lora-forward", None, False)]
    assert "likely cause: the scale is missing" in found["failures"][0]
    assert "cpu.json: please attach it to an issue of the form 'A device that was tried'" in printed


def test_a_broken_kernel_that_no_other_law_has_is_told():
    own = WITH_KERNEL["swiglu"]
    checks = kernel_checks(torch.device("cpu"), torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(own, "kernel", lambda gate, up: own.function(up, gate))
        with pytest.raises(CheckFailure, match="kernel-swiglu: the result: wrong"):
            checks["kernel-swiglu"]()
    for check in checks.values():
        check()
