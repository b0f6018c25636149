import json
import math
import sys
from xml.etree import ElementTree

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from minilora import cli
from minilora.cli.plot import COLOURS, distinct_names, draw, held_out_loss, needs_logarithm, save_picture
from minilora.errors import FormatError
from minilora.runs.reports import Curve, Metrics, read_metrics, smooth

values = st.lists(st.floats(0.01, 100), max_size=200)
NONE = Curve((), ())


def curve(values, first=1):
    return Curve(tuple(range(first, first + len(values))), tuple(values))


def metrics(losses, evaluations=()):
    return Metrics(curve(losses), curve([1e-3] * len(losses)), curve([2.0] * len(losses)), curve(evaluations))


def records(steps, every=10):
    for step in range(1, steps + 1):
        loss = 0.5 + 5 / step + 0.2 * math.sin(7 * step)
        yield {"step": step, "loss": loss, "learning_rate": 1e-3 / step, "grad_norm": 1 + math.cos(3 * step) ** 2}
        if step % every == 0:
            yield {"step": step, "eval_loss": loss + 0.125, "rows": 7}


def write_run(path, records):
    path.mkdir(parents=True)
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def plot(*words):
    return cli.main(["plot", *map(str, words)])


# --- reading ---


def test_the_curves_are_what_the_run_wrote_without_what_is_not_finite(tmp_path):
    written = list(records(30))
    run = read_metrics(write_run(tmp_path / "run", written))
    for key in ("loss", "learning_rate", "grad_norm", "eval_loss"):
        expected = [(record["step"], record[key]) for record in written if key in record]
        assert list(zip(*vars(getattr(run, key)).values(), strict=True)) == expected
    losses = [{"step": i, "loss": loss} for i, loss in enumerate([1, math.nan, math.inf, None, 2])]
    assert read_metrics(write_run(tmp_path / "other", losses)).loss == Curve((0, 4), (1, 2))


def test_of_a_file_cut_off_anywhere_every_whole_line_counts(tmp_path):
    path = write_run(tmp_path / "run", records(2, every=1)) / "metrics.jsonl"
    whole = path.read_bytes()
    for length in range(len(whole.splitlines(keepends=True)[0]), len(whole) + 1):
        path.write_bytes(whole[:length])
        run = read_metrics(path.parent)
        assert len(run.loss) + len(run.eval_loss) == whole[:length].count(b"\n")


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        (None, "run/metrics.jsonl: no such file"),
        ("", "run/metrics.jsonl: holds no step yet"),
        ('{"step": 1', "run/metrics.jsonl: holds no step yet"),
        ('{"step": 1\n{"step": 2}\n', "run/metrics.jsonl, line 1: not JSON"),
        ('{"step": 1}\n[2]\n', "run/metrics.jsonl, line 2: need an object"),
        ('{"step": 1}\n{"loss": 2}\n', "run/metrics.jsonl, line 2: need an object with a whole number as 'step'"),
    ],
)
def test_a_directory_that_holds_no_metrics_is_named_with_the_reason(tmp_path, monkeypatch, capsys, text, phrase):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    if text is not None:
        (tmp_path / "run" / "metrics.jsonl").write_text(text)
    assert plot("run") == 1
    assert capsys.readouterr().err.startswith(f"minilora: {phrase}")
    assert not (tmp_path / "run" / "plot.svg").exists()


# --- curves ---


@given(values)
@example([1.0] * 39 + [2.0])
def test_a_smoothed_value_is_the_mean_of_the_window_around_it(values):
    half = len(values) // 40
    for i, value in enumerate(smooth(curve(values)).values):
        reach = min(i, half)
        window = [values[j] for j in range(len(values)) if abs(j - i) <= reach]
        assert value == pytest.approx(sum(window) / len(window))


def test_only_curves_above_zero_that_span_a_decade_are_drawn_logarithmically():
    assert needs_logarithm([curve([0.1]), curve([1.5, 0.5])])
    assert not needs_logarithm([curve([0.2]), curve([1.5, 0.5])])
    assert not needs_logarithm([curve([0.0, 5.0])])
    assert not needs_logarithm([NONE])


# --- the picture ---


def texts(path):
    return ["".join(element.itertext()).strip() for element in ElementTree.parse(path).iter() if "text" in element.tag]


def drawing(runs, *held_out):
    pytest.importorskip("matplotlib")
    return draw(runs, *held_out)


def drawn(axes, **style):
    """The (x, y) points of the lines that have this style."""
    lines = (line for line in axes.get_lines() if all(getattr(line, f"get_{k}")() == v for k, v in style.items()))
    return [list(zip(*line.get_data(), strict=True)) for line in lines]


def points(curve):
    return list(zip(curve.steps, curve.values, strict=True))


def test_each_panel_holds_the_points_of_its_curve_in_the_colour_of_the_run(tmp_path):
    runs = {name: read_metrics(write_run(tmp_path / name, records(n, every=4))) for name, n in (("a", 12), ("b", 35))}
    loss, rate, norm = drawing(runs).get_axes()
    for colour, run in zip(COLOURS, runs.values(), strict=False):
        assert drawn(loss, color=colour) == [points(run.loss), points(run.eval_loss)]
        assert drawn(rate, color=colour) == [points(run.learning_rate)]
        assert drawn(norm, color=colour) == [points(run.grad_norm)]


def test_of_many_steps_a_smoothed_line_lies_over_a_faint_one_unless_the_runs_are_many(tmp_path):
    run = read_metrics(write_run(tmp_path / "run", records(100)))
    faint, bold, _ = drawing({"run": run}).get_axes()[0].get_lines()
    assert list(faint.get_ydata()) == list(run.loss.values)
    assert faint.get_alpha() < 0.5
    assert list(bold.get_ydata()) == list(smooth(run.loss).values)
    assert len(drawing(dict.fromkeys("abcd", run)).get_axes()[0].get_lines()) == 4 * 2


def test_runs_are_told_apart_by_colour_and_dash_a_single_step_is_a_dot_and_the_title_names_one_run():
    lines = drawing(dict.fromkeys("abcdefghijklmnopqrst", metrics([3.0, 2.0]))).get_axes()[1].get_lines()
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 20
    lines = [line for panel in drawing({"run": metrics([3.0], [2.0])}).get_axes() for line in panel.get_lines()]
    assert [line.get_marker() for line in lines] == [".", "o", ".", "."]
    assert draw({"$a_b$": metrics([1.0])}).get_suptitle() == "Fine-tuning: $a_b$"
    assert draw(dict.fromkeys("ab", metrics([1.0]))).get_suptitle() == "Fine-tuning: 2 runs"


def legend(*runs):
    return [text.get_text() for text in drawing(*runs).legends[0].get_texts()]


def test_the_legend_has_an_entry_for_what_is_drawn_and_no_other():
    few, many = metrics([3.0, 2.0], [1.0]), metrics([3.0, 2.0] * 30)
    assert legend({"a": few}) == ["training", "evaluation"]
    assert legend({"a": many}) == ["each step", "training, smoothed"]
    assert legend({"a": few, "b": many}) == ["a", "b", "each step", "training, smoothed", "evaluation"]
    assert legend(dict.fromkeys("abcd", many)) == [*"abcd", "training, smoothed"]
    assert legend({"a": metrics([], [1.0])}, {"a": curve([2.0])}) == ["evaluation", "held-out loss before and after"]


def test_the_loss_before_and_after_is_that_of_the_summary(tmp_path):
    run = write_run(tmp_path / "run", records(12))
    assert held_out_loss(run) == NONE
    summary = {"before": {"loss": 3.5}, "after": {"loss": 0.5}, "steps": 12}
    (run / "summary.json").write_text(json.dumps(summary))
    found = held_out_loss(run)
    assert points(found) == [(0, 3.5), (12, 0.5)]
    loss = drawing({"run": read_metrics(run)}, {"run": found}).get_axes()[0]
    assert drawn(loss, marker="D") == [points(found)]
    (run / "summary.json").write_text(json.dumps(summary | {"before": {"loss": None}, "after": {"loss": None}}))
    assert held_out_loss(run) == NONE
    (run / "summary.json").write_text(json.dumps({"before": {"loss": 3.5}}))
    with pytest.raises(FormatError, match=r"summary\.json: need 'steps'"):
        held_out_loss(run)


def test_the_legend_names_every_run_as_it_is_written(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    names = ["_hidden", "$x_2$", "a&b<c>"]
    runs = [write_run(tmp_path / name, records(50)) for name in names]
    assert plot(*runs, "--out", tmp_path / "all.svg") == 0
    written = texts(tmp_path / "all.svg")
    assert {*names, "each step", "training, smoothed", "evaluation", "step", "learning rate", "gradient norm"} <= {
        *written
    }
    assert capsys.readouterr().out == f"plot written to {tmp_path / 'all.svg'}\n"


def test_a_picture_of_a_thousand_steps_is_small_opaque_and_always_of_the_same_bytes(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    run = {"run": read_metrics(write_run(tmp_path / "run", records(1000, every=50)))}
    save_picture(run, tmp_path / "one.svg")
    with matplotlib.rc_context({"figure.facecolor": "red", "font.size": 20, "svg.hashsalt": None}):
        save_picture(run, tmp_path / "two.svg")
        assert matplotlib.rcParams["font.size"] == 20
    written = (tmp_path / "one.svg").read_bytes()
    assert written == (tmp_path / "two.svg").read_bytes()
    assert len(written) <= 60_000
    assert b"<dc:date>" not in written
    assert b"fill: #ffffff" in written[: written.index(b"axes_1")]


def test_the_picture_is_svg_or_png_and_stands_in_the_directory_of_one_run_or_here(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    for name in "ab":
        write_run(tmp_path / name, records(5))
    monkeypatch.chdir(tmp_path)
    for words in (["a"], ["a", "b"], ["b", "--out", "x/y.png"], ["b", tmp_path / "b", "--out", "twice.png"]):
        assert plot(*words) == 0
    assert (tmp_path / "x" / "y.png").read_bytes() == (tmp_path / "twice.png").read_bytes()
    assert (tmp_path / "a" / "plot.svg").read_bytes() != (tmp_path / "plot.svg").read_bytes()
    assert (tmp_path / "x" / "y.png").read_bytes().startswith(b"\x89PNG")
    assert plot("a", "--out", "a.pdf") == 1
    assert "a.pdf: ends in '.pdf'; need one of .svg, .png" in capsys.readouterr().err


def test_names_of_runs_are_their_directories_with_as_many_parents_as_tell_them_apart(tmp_path):
    a, b, c = tmp_path / "x" / "run", tmp_path / "y" / "run", tmp_path / "z"
    assert distinct_names([a, c]) == ["run", "z"]
    assert distinct_names([a, b]) == ["x/run", "y/run"]
    assert distinct_names([a / "s", b / "s"]) == ["x/run/s", "y/run/s"]


def test_without_matplotlib_the_command_says_how_to_get_it(tmp_path, monkeypatch, capsys):
    run = write_run(tmp_path / "run", records(60))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert plot(run) == 1
    assert "pip install 'minilora[plot]'" in capsys.readouterr().err
    assert [path.name for path in run.iterdir()] == ["metrics.jsonl"]
