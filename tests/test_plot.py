import json
import math
import sys

import pytest

from minilora import cli
from minilora.cli.plot import draw
from minilora.errors import FormatError


def records(steps, every=10):
    for step in range(1, steps + 1):
        yield {"step": step, "loss": 0.5 + 5 / step + 0.2 * math.sin(7 * step), "learning_rate": 1e-3}
        if step % every == 0:
            yield {"step": step, "eval_loss": 0.6 + 5 / step, "rows": 7}


def write_run(path, records):
    path.mkdir(parents=True)
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def plot(*words):
    return cli.main(["plot", *map(str, words)])


def drawn(line):
    return list(zip(*line.get_data(), strict=True))


def written(records, key):
    return [(record["step"], record[key]) for record in records if record.get(key) is not None]


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        (None, "run/metrics.jsonl: cannot be read (No such file"),
        ("", "run: holds no step with loss yet"),
        ('{"step": 1\n{"step": 2}\n', "run/metrics.jsonl, line 1: not JSON"),
        ('{"step": 1}\n{"loss": 2}\n', "run/metrics.jsonl, line 2: need an object with a whole number as 'step'"),
    ],
)
def test_a_directory_that_holds_no_metrics_is_named_with_the_reason(tmp_path, monkeypatch, capsys, text, phrase):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    if text is not None:
        (tmp_path / "run" / "metrics.jsonl").write_text(text)
    assert plot("run") == 1
    assert capsys.readouterr().err.startswith(f"minilora: {phrase}")
    assert not (tmp_path / "plot.svg").exists()


# --- the picture ---


def test_each_step_and_each_evaluation_is_a_point_and_a_run_has_one_colour():
    pytest.importorskip("matplotlib")
    runs = {"a": list(records(12, every=4)), "b": [*records(35), {"step": 36, "loss": None}]}
    lines = draw(runs).get_axes()[0].get_lines()
    for run, (faint, mean, evaluations) in zip(runs.values(), (lines[:3], lines[3:]), strict=True):
        assert drawn(faint) == drawn(mean) == written(run, "loss")
        assert drawn(evaluations) == written(run, "eval_loss")
        assert len({line.get_color() for line in (faint, mean, evaluations)}) == 1
    assert lines[0].get_color() != lines[3].get_color()


def test_another_metric_and_its_evaluations_are_drawn_by_name():
    pytest.importorskip("matplotlib")
    run = [{"step": 1, "loss": 2.0, "reward": 0.5}, {"step": 1, "eval_loss": 3.0, "eval_reward": 0.25}]
    axes = draw({"run": run}, "reward").get_axes()[0]
    assert [drawn(line) for line in axes.get_lines()] == [[(1, 0.5)], [(1, 0.5)], [(1, 0.25)]]
    assert axes.get_ylabel() == "reward"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["training, run", "evaluation, run"]
    (text,) = draw({"run": run}, "eval_reward").get_axes()[0].get_legend().get_texts()
    assert text.get_text() == "evaluation, run"
    with pytest.raises(FormatError, match="no step with margin yet; it has eval_loss, eval_reward, loss, reward"):
        draw({"run": run}, "margin")


def test_of_many_steps_the_line_is_the_mean_of_those_around_a_step():
    pytest.importorskip("matplotlib")
    run = list(records(100))
    _, mean, _ = draw({"run": run}).get_axes()[0].get_lines()
    losses = dict(written(run, "loss"))
    assert len(drawn(mean)) == 96
    for step, value in drawn(mean):
        assert value == pytest.approx(sum(losses[step + i] for i in range(-2, 3)) / 5)


def test_the_picture_is_what_the_name_ends_in(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    run = write_run(tmp_path / "run", records(5))
    for name, begins in (("x/y.png", b"\x89PNG"), ("y.svg", b"<?xml"), ("y.pdf", b"%PDF")):
        assert plot(run, "--out", tmp_path / name) == 0
        assert capsys.readouterr().out == f"plot written to {tmp_path / name}\n"
        assert (tmp_path / name).read_bytes().startswith(begins)
    assert plot(run, "--out", "a.gif") == 1
    assert "a.gif: ends in '.gif'; need one of .svg, .png, .pdf" in capsys.readouterr().err


def test_without_matplotlib_the_command_says_how_to_get_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert plot(write_run(tmp_path / "run", records(60)), "--out", tmp_path / "plot.svg") == 1
    assert "pip install matplotlib" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
