"""What the commands tell of memory: `inspect --memory`, `finetune --dry-run`, and a run that does not fit."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch

import minilora as ml
from minilora import cli
from minilora.cli.memory import amount
from minilora.models.config import LlamaConfig
from minilora.models.quantization import QuantizeConfig
from minilora.runs import run_memory
from minilora.runs.batch import plan_steps
from minilora.runs.config import DataConfig, TrainConfig
from minilora.runs.diagnose import free_memory_bytes
from minilora.runs.memory import ROOM, forecast
from minilora.runs.run import Run
from minilora.runs.run_memory import memory_of
from minilora.runs.settings import RunConfig
from minilora.tools import inspect_memory as memory
from minilora.tools.inspect_memory import SHAPES, WAYS, told
from tests.models import four_bit, long, tiny_config, tiny_model
from tests.runs import SETTINGS, words, write_inputs

CPU = torch.device("cpu")


# --- inspect --memory ---


@pytest.mark.long
def test_a_full_fine_tune_holds_sixteen_bytes_a_parameter():
    found, config = told(tiny_config(), "full fine-tune", CPU), tiny_config()
    count = sum(p.numel() for p in ml.model.llama.Llama(config).parameters())
    assert (found.weights, found.adapters) == (4 * count, 0)
    assert 4 * count <= found.gradients < 4.1 * count  # in their buffer there are gaps
    assert 8 * count <= found.optimizer < 8.2 * count
    assert found.peak > 16 * count


@pytest.mark.long
def test_qlora_has_the_weights_of_the_packed_model_and_at_most_one_dense_weight_more_than_its_forecast():
    found = told(tiny_config(), "QLoRA", CPU)
    model = four_bit(tiny_model(dtype=torch.bfloat16))
    weights = sum(p.nbytes for p in model.parameters())
    ml.attach(model, ml.LoraConfig())
    traced = forecast(model, [1024] * 4, 4096, TrainConfig(), CPU)
    assert found.weights == traced.weights == weights
    assert 0 <= found.peak - traced.peak <= 40 * 24 * 2


def test_a_config_json_is_enough(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(memory, "SHAPES", {})
    monkeypatch.setattr(memory, "WAYS", ("LoRA 16-bit",))
    source = {key: value for key, value in tiny_config().source.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(source))
    assert cli.main(["inspect", str(tmp_path), "--memory"]) == 0
    page = capsys.readouterr().out
    assert "4 rows of 1,024 tokens" in page
    assert "rank 16" in page
    assert max(map(len, page.splitlines())) <= 120
    found = told(LlamaConfig.from_dict(source), "LoRA 16-bit", CPU)
    cells = re.search(r"LoRA 16-bit +(.*)", page)[1]
    assert re.split(r"  +", cells.strip()) == [amount(value) for value in vars(found).values()]


@pytest.mark.long
def test_three_shapes_follow(tmp_path, capsys):
    source = {key: value for key, value in tiny_config().source.items() if value is not None}
    (tmp_path / "config.json").write_text(json.dumps(source))
    assert cli.main(["inspect", str(tmp_path), "--memory"]) == 0
    page = capsys.readouterr().out
    for name, least in zip(SHAPES, (13.4, 26.0, 137.9), strict=True):
        table = page.split(f"\n{name}\n")[1]
        weights = [float(row.split(way)[1].split()[0]) for row, way in zip(table.splitlines()[1:5], WAYS, strict=True)]
        assert abs(weights[0] - 2 * weights[1]) <= 0.2  # each is rounded to a tenth
        assert least <= weights[1] <= least + 0.2
        assert weights[2] < 0.3 * weights[1]


def test_a_directory_without_a_config_json_is_refused(tmp_path, capsys):
    (tmp_path / "adapter_config.json").write_text("{}")
    assert cli.main(["inspect", str(tmp_path), "--memory"]) != 0
    assert "holds no config.json" in capsys.readouterr().err


# --- finetune ---


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("memory"))


def finetune(directory, out, *flags, **changes):
    """The command, with the defaults of everything but general text, which is left out."""
    defaults = dict.fromkeys([*SETTINGS, "force"]) | {"general_data": "none"}
    return cli.main([*words(directory, out, **{**defaults, **changes}), *flags])


def planned(directory, out, **training):
    """The run of that command, and its data."""
    where = RunConfig(str(directory / "model"), (str(directory / "rows.jsonl"),), str(out), device="cpu")
    where = replace(where, general_data="none")
    made = Run(where, QuantizeConfig(), ml.LoraConfig(), DataConfig(), TrainConfig(**training))
    return made, made.load(is_dry=True)[1]


def test_a_dry_run_tells_each_part_beside_what_is_free(directory, tmp_path, capsys):
    assert finetune(directory, tmp_path / "out", "--dry-run") == 0
    page = capsys.readouterr().out
    made, data = planned(directory, tmp_path / "out")
    found = memory_of(made, data, CPU)
    for name, value in vars(found).items():
        shown = f"at most {amount(value)} at once" if name == "peak" else f"{name.replace('_', ' ')} {amount(value)}"
        assert shown in page
    unit = page.rsplit(" free", 1)[0].rsplit(" ", 1)[1]
    assert unit == amount(free_memory_bytes(CPU)).split()[1]


@pytest.mark.long
@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_batch_is_the_one_that_takes_the_most(directory, tmp_path, batch_size):
    made, data = planned(directory, tmp_path / "out", batch_size=batch_size)
    model = ml.load_model(directory / "model")
    ml.attach(model, ml.LoraConfig())
    lengths = [len(example.tokens) for example in data.train]
    batches = {tuple(lengths[row] for row in rows) for step in plan_steps(lengths, made.training) for rows in step}
    assert len(set(map(sum, batches))) > 1
    each = [forecast(model, batch, 1, made.training, CPU).activations for batch in batches]
    assert memory_of(made, data, CPU).activations == max(each)


@pytest.mark.long
def test_a_run_that_cannot_fit_is_refused_with_the_three_cheapest_ways_out_that_come_true(
    directory, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(run_memory, "free_memory_bytes", lambda device: 1234)
    assert finetune(directory, tmp_path / "out", batch_size=20) != 0
    assert not (tmp_path / "out").exists()
    error = capsys.readouterr().err
    made, data = planned(directory, tmp_path / "out", batch_size=20)
    needed = memory_of(made, data, CPU).peak
    assert f"needs {amount(needed)} of memory, and 1.2 kB are free" in error
    expected = [
        ("--batch-size 10 --gradient-accumulation-steps 2", {"batch_size": 10, "gradient_accumulation_steps": 2}),
        ("--recompute block", {"recompute": "block"}),
        ("--quantize nf4", {"quantize": "nf4"}),
    ]
    helpful = [(flags, memory_of(made, data, CPU, **change).peak) for flags, change in expected]
    assert all(peak < needed for _, peak in helpful)
    lines = [f"{flags} brings it to {amount(peak)}" for flags, peak in helpful]
    assert [line.strip().partition(";")[0] for line in error.splitlines() if "brings it to" in line] == lines
    assert "--force" in error
    assert finetune(directory, tmp_path / "out", "--dry-run", batch_size=20) != 0
    assert capsys.readouterr().err == error


@pytest.mark.long
def test_a_run_that_is_forced_or_fits_runs(directory, tmp_path, capsys, monkeypatch):
    made, data = planned(directory, tmp_path / "out")
    needed = memory_of(made, data, CPU).peak
    for name, free, flags in (("forced", 1, ["--force"]), ("fits", needed, []), ("unknown", None, [])):
        monkeypatch.setattr(run_memory, "free_memory_bytes", lambda device, free=free: free)
        assert finetune(directory, tmp_path / name, *flags, max_steps=1) == 0
        assert (tmp_path / name / "summary.json").is_file()
    monkeypatch.setattr(run_memory, "free_memory_bytes", lambda device: needed - 1)
    assert finetune(directory, tmp_path / "not") != 0


@pytest.mark.parametrize("way", ["mlp", *long("none", "block")])
def test_auto_chooses_tells_and_records_how_a_run_recomputes(directory, tmp_path, capsys, monkeypatch, way):
    needed = memory_of(*planned(directory, tmp_path / "out"), CPU, recompute=way).peak
    monkeypatch.setattr(run_memory, "free_memory_bytes", lambda device: math.ceil(needed / ROOM))
    for flags in (["--dry-run"], []):
        assert finetune(directory, tmp_path / "out", *flags, max_steps=1, recompute="auto") == 0
        assert f"--recompute {way}: " in capsys.readouterr().err
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["config"]["recompute"] == "auto"
    assert record["starts"][0]["recompute"] == way


def test_amounts_are_told_in_powers_of_a_thousand():
    assert [amount(n) for n in (7, 1000, 2_500_000, 13_480_000_000)] == ["7 bytes", "1.0 kB", "2.5 MB", "13.5 GB"]
