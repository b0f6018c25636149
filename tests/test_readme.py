"""The README's Python runs as it stands, on the built-in model and data."""

import re
from pathlib import Path

import pytest

import minilora as ml
from minilora.storage import ASSETS, BUILTIN

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL))
def test_the_python_of_the_readme_runs(block, tmp_path, monkeypatch):
    rows = (ASSETS / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines()[:4]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    exec(compile(block.replace("path/to/model", BUILTIN), "README.md", "exec"), {})
    merged = ml.load_model(tmp_path / "merged")
    assert ml.count_parameters(merged) == ml.count_parameters(ml.load_model(BUILTIN))
    ml.load_adapter(merged, tmp_path / "adapter")
