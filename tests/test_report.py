import sys

import pytest

from minilora import LoraConfig, TrainConfig
from minilora.errors import ConfigError
from minilora.models.bitsandbytes import QuantizeConfig
from minilora.models.checkpoint import read_config
from minilora.runs.config import RunConfig, check_settings
from minilora.runs.reports import TensorBoard
from minilora.storage import ASSETS

TAGS = {
    "train/loss": "loss",
    "train/learning_rate": "learning_rate",
    "train/grad_norm": "grad_norm",
    "train/tokens_per_second": "tokens_per_second",
    "eval/loss": "eval_loss",
}


def record(step, loss=1.0):
    return {
        "step": step,
        "loss": loss,
        "learning_rate": 1e-3 / step,
        "grad_norm": 2.0 + step,
        "tokens_per_second": 100.0 * step,
        "peak_memory_bytes": 7,
        "tokens": 5,
        "total_steps": 9,
    }


def write(directory, records, step=0):
    pytest.importorskip("tensorboard")
    board = TensorBoard(directory, step)
    for values in records:
        board(values)
    board.close()


def read(directory):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(directory)).Reload()


def scalars(events, tag):
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_the_event_file_gives_the_metrics_back(tmp_path):
    records = [record(1), record(2), {"step": 2, "eval_loss": 0.5}, record(3), {"step": 3, "eval_loss": 0.25}]
    write(tmp_path, records)
    events = read(tmp_path)
    assert set(events.Tags()["scalars"]) == set(TAGS)
    for tag, key in TAGS.items():
        expected = [(values["step"], values[key]) for values in records if key in values]
        assert scalars(events, tag) == [(step, pytest.approx(value)) for step, value in expected]


def test_a_resumed_run_shows_each_step_once_as_it_was_done_last(tmp_path):
    write(tmp_path, [record(step, loss=step) for step in range(1, 6)])
    write(tmp_path, [record(step, loss=10 * step) for step in range(4, 7)], step=3)
    assert scalars(read(tmp_path), "train/loss") == [(1, 1), (2, 2), (3, 3), (4, 40), (5, 50), (6, 60)]


def test_a_record_is_on_the_disk_when_it_was_told(tmp_path):
    pytest.importorskip("tensorboard")
    board = TensorBoard(tmp_path)
    board(record(1))
    assert scalars(read(tmp_path), "train/loss") == [(1, 1.0)]
    board.close()


def test_samples_are_pages_that_show_prompt_and_text_as_they_are(tmp_path):
    samples = [{"prompt": "# Who?\n\n<b>", "text": "*I*\n  am"}, {"prompt": "", "text": "x"}]
    write(tmp_path, [{"step": 4, "eval_loss": 1.0, "samples": samples}])
    events = read(tmp_path)
    assert events.Tags()["tensors"] == ["samples/1/text_summary", "samples/2/text_summary"]
    (event,) = events.Tensors("samples/1/text_summary")
    page = event.tensor_proto.string_val[0].decode()
    assert event.step == 4
    assert page == "prompt:\n\n    # Who?\n    \n    <b>\n\ntext:\n\n    *I*\n      am"


def test_without_tensorboard_the_error_says_before_a_run_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    settings = RunConfig(report="tensorboard"), QuantizeConfig(), LoraConfig(), TrainConfig()
    with pytest.raises(ConfigError, match=r"--report tensorboard needs .* pip install 'minilora\[tensorboard\]'"):
        check_settings(*settings, read_config(ASSETS / "model"))
