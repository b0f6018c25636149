"""A sweep: each run is the run alone, a stopped sweep goes on, and what is shown."""

import pytest
import torch

import minilora as ml
from minilora.files import read_json
from recipes.sweep import best, heat_map, sweep, table
from tests.files import same_state
from tests.models import tiny_model
from tests.training import random_rows

ROWS, HELD_OUT = random_rows(0, 8), random_rows(1, 4)
CONFIG = ml.TrainConfig(batch_size=2, max_steps=3, save_steps=1)
LORA = ml.LoraConfig(lora_alpha=6)
LOSSES = {(2, 1e-3): 2.5, (2, 0.02): 1.25, (4, 1e-3): 2.25, (4, 0.02): 1.75}


def base():
    return tiny_model(dtype=torch.float32, num_hidden_layers=1)


def run(out, model=None, rows=ROWS, ranks=(2, 4), rates=(1e-3, 0.02)):
    return sweep(model or base(), rows, HELD_OUT, out, ranks, rates, LORA, CONFIG)


def test_each_loss_is_that_of_a_run_alone_and_the_model_is_as_it_was(tmp_path):
    model = base()
    losses = run(tmp_path, model)
    same_state(model, base())
    for (r, rate), loss in losses.items():
        records, alone = [], base()
        ml.attach(alone, ml.LoraConfig(r=r, lora_alpha=6))
        config = ml.TrainConfig(batch_size=2, max_steps=3, learning_rate=rate, eval_steps=9)
        ml.train(alone, ROWS, config, records.append, HELD_OUT)
        assert loss == records[-1]["eval_loss"]
        assert read_json(tmp_path / f"r{r}-{rate:g}" / "adapter_config.json")["r"] == r
    assert len({*losses.values()}) == 4


def test_a_stopped_sweep_goes_on_with_the_step_it_was_at_and_repeats_no_run(tmp_path):
    class Rows(list):
        read, most = 0, 10**9

        def __getitem__(self, index):
            Rows.read += 1
            if Rows.read > Rows.most:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    expected, passed = run(tmp_path / "whole"), len(ROWS)  # a fingerprint reads all
    Rows.most = passed + 6 + passed + 2  # the second run is stopped in its second step
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "half", rows=Rows(ROWS))
    Rows.read, Rows.most = 0, 10**9
    assert run(tmp_path / "half", rows=Rows(ROWS)) == expected
    whole, half = (sorted((tmp_path / name).glob("*/adapter_model.safetensors")) for name in ("whole", "half"))
    assert [file.read_bytes() for file in half] == [file.read_bytes() for file in whole]
    assert len(whole) == 4
    assert Rows.read == 4 * passed + 4 + 6 + 6
    assert run(tmp_path / "half", rows=Rows(ROWS), ranks=(2, 4, 3)).items() > expected.items()


def test_a_run_that_diverges_is_infinite_and_the_sweep_goes_on_with_the_model_as_it_was(tmp_path):
    model = base()
    losses = run(tmp_path, model, ranks=(2,), rates=(1e30, 1e-3))
    assert losses[2, 1e30] == float("inf")
    assert best(losses) == (2, 1e-3)
    assert "| 2 | **" in table(losses)
    same_state(model, base())
    with pytest.raises(ml.TrainingError, match="other data"):
        run(tmp_path, model, rows=ROWS[:-1], ranks=(2,))
    same_state(model, base())


def test_the_table_and_the_map_have_each_loss_in_its_place():
    assert best(LOSSES) == (2, 0.02)
    assert table(LOSSES).splitlines() == [
        "| r | 0.001 | 0.02 |",
        "| --- | --- | --- |",
        "| 2 | 2.5000 | **1.2500** |",
        "| 4 | 2.2500 | 1.7500 |",
    ]
    pytest.importorskip("matplotlib")
    axes = heat_map(LOSSES).get_axes()[0]
    assert axes.get_images()[0].get_array().tolist() == [[2.5, 1.25], [2.25, 1.75]]
    assert [text.get_text() for text in axes.texts] == ["2.500", "1.250", "2.250", "1.750"]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["2", "4"]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0.001", "0.02"]
