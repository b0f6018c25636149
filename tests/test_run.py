import csv
import dataclasses
import hashlib
import json
import math
import os
import platform
import shutil
import signal
import sys
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest
from filelock import Timeout

import minilora as ml
from minilora import cli
from minilora.cli import finetune as command
from minilora.cli.messages import shorten
from minilora.errors import printable
from minilora.models import checkpoint, template
from minilora.runs import directory as run_directory
from minilora.runs import lock
from minilora.runs.checkpoints import checkpoints
from minilora.runs.directory import PACKAGES
from minilora.runs.evaluate import held_out_loss, measure_forgetting, prompt_of
from minilora.runs.inputs import load_general
from minilora.runs.lock import locked
from minilora.runs.settings import FLAG_NAMES
from minilora.testing.compare import assert_parity
from tests import runs
from tests.models import long
from tests.runs import contents, finetune, inputs, interrupt, metrics, starts, steps, summary, unfinished
from tests.text import EOS
from tests.training import number

STEPS = 10  # 23 rows, 4 of them held out: 19 make 10 micro-batches, 5 steps an epoch


@pytest.fixture(scope="module")
def whole(directory, tmp_path_factory):
    """A run that never stopped."""
    out = tmp_path_factory.mktemp("whole")
    assert finetune(directory, out, save_total_limit=99) == 0
    return out


def assert_resumed(out, whole, *started):
    """The run in this directory began anew after these steps, and ended as the one that never stopped."""
    assert starts(out) == [0, *started]
    assert steps(out) == list(range(1, STEPS + 1))
    assert contents(out) == contents(whole)


def stop(directory, out, monkeypatch, step=3, number=signal.SIGINT, times=1, **changes):
    """Send a run a signal in this step, which its status has. What handles the signal is as before."""
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        interrupt(patch, step, times, number)
        try:
            status = finetune(directory, out, **changes)
        except SystemExit as error:
            status = error.code
    assert signal.getsignal(number) is before
    assert status == 128 + number


# --- what a run leaves ---


def test_a_finished_run_has_the_files_of_the_contract_and_no_others(directory, whole):
    names = {*runs.ADAPTER, "metrics.jsonl", "summary.json", "run.json", "checkpoints", "minilora-manifest.json"}
    names |= {"tokenizer.json", "tokenizer_config.json", "minilora-prompts.json", "held_out.jsonl", "README.md"}
    assert {path.name for path in whole.iterdir()} == names
    assert '"text"' not in (whole / "held_out.jsonl").read_text()  # an answer, as `samples` is 0
    assert [path.name for path in checkpoints(whole / "checkpoints")] == [f"step-{n:06d}" for n in (2, 4, 6, 8, 10)]
    base = json.loads((whole / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == str(directory / "model")


def test_metrics_have_an_object_a_step(whole, directory):
    keys = {"step", "loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "peak_memory_bytes"}
    assert {frozenset(record) for record in metrics(whole)} == {frozenset(keys)}
    assert steps(whole) == list(range(1, STEPS + 1))
    data = inputs(directory, eval_split=0.2)
    assert sum(record["tokens"] for record in metrics(whole)) == 2 * sum(len(row.tokens) for row in data.train)


def test_evaluations_are_among_the_metrics_and_logging_steps_thin_out_the_rest(directory, tmp_path):
    assert finetune(directory, tmp_path, eval_steps=3, logging_steps=4, max_steps=9) == 0
    found = [(record["step"], record.keys() == {"step", "eval_loss", "best_step"}) for record in metrics(tmp_path)]
    assert found == [(3, True), (4, False), (6, True), (8, False), (9, True)]


def test_the_summary_has_the_losses_of_the_base_and_of_the_saved_adapter(directory, whole):
    found = summary(whole)
    names = {"before", "start", "after", "general", "steps", "kept_step", "tokens", "seconds", "peak_memory_bytes"}
    assert found.keys() == names
    model = ml.load_model(directory / "model")
    data = inputs(directory, eval_split=0.2)
    assert_parity(number(found["before"]["loss"]), number(held_out_loss(model, data.test)))
    ml.load_adapter(model, whole)
    assert_parity(number(found["after"]["loss"]), number(held_out_loss(model, data.test)))
    assert found["after"]["loss"] < found["before"]["loss"]
    assert found["before"]["accuracy"] is found["after"]["accuracy"] is None  # of 4 rows with 2 answers
    assert (found["steps"], found["tokens"]) == (STEPS, sum(record["tokens"] for record in metrics(whole)))
    assert found["general"] is None  # as `general_data` is "none"
    assert found["seconds"] > 0
    assert found["peak_memory_bytes"] > 0


def test_without_held_out_rows_there_is_no_score(directory, tmp_path, capsys):
    assert finetune(directory, tmp_path, max_steps=1, eval_split=0) == 0
    assert summary(tmp_path)["after"] == {"loss": None, "accuracy": None}
    assert capsys.readouterr().out.splitlines()[0].split() == ["held-out", "loss"]


def test_a_run_of_another_version_is_resumed_by_that_version_alone(tmp_path, whole, refused):
    """Its checkpoints may hold what this version would read as something else."""
    path = unfinished(whole, tmp_path, step=4) / "run.json"
    path.write_text(path.read_text().replace(f'"minilora": "{ml.__version__}"', '"minilora": "0.2.0"'))
    refused(tmp_path, f"minilora {ml.__version__} does not resume a run of 0.2.0")


def test_run_json_says_which_settings_versions_and_data_and_every_start(directory, whole):
    record = json.loads((whole / "run.json").read_text())
    assert list(record) == ["config", "versions", "data_sha256", "inputs_sha256", "starts"]
    assert {name: record["config"][name] for name in runs.SETTINGS} == runs.SETTINGS
    fields = {field.name for cls in runs.CLASSES for field in dataclasses.fields(cls)} - {"task_type"}  # no setting
    assert set(record["config"]) == {FLAG_NAMES.get(name, name) for name in fields}
    assert set(record["versions"]) == {*PACKAGES, "python"}
    assert record["versions"]["minilora"] == ml.__version__
    digest = hashlib.sha256((directory / "rows.jsonl").read_bytes()).hexdigest()
    assert record["data_sha256"] == {"rows.jsonl": digest}
    names = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    hashes = {f"model/{name}": hashlib.sha256((directory / "model" / name).read_bytes()).hexdigest() for name in names}
    assert record["inputs_sha256"] == hashes
    names = {"time", "step", "device", "dtype", "gradient_checkpointing", "threads", "plain", "ranks", "shard"}
    assert [set(start) for start in record["starts"]] == [names]


# --- stopping and going on ---


@pytest.mark.parametrize("save_steps", [0, *long(None, 2)])
def test_a_run_stopped_by_a_signal_goes_on_to_the_same_bytes_without_gaps_or_repeats(
    directory, whole, tmp_path, monkeypatch, capsys, save_steps
):
    """By Ctrl-C, and by SIGTERM, which schedulers send: the step is finished first."""
    for step, which in ((3, signal.SIGINT), (8, signal.SIGTERM)):
        stop(directory, tmp_path, monkeypatch, step, which, save_steps=save_steps)
        assert "the same command resumes it" in capsys.readouterr().err
        assert not (tmp_path / "summary.json").exists()
        assert steps(tmp_path) == list(range(1, step + 1))
    assert finetune(directory, tmp_path, save_steps=save_steps) == 0
    assert_resumed(tmp_path, whole, 3, 8)
    for key in ("before", "after", "steps", "tokens"):
        assert summary(tmp_path)[key] == summary(whole)[key]
    assert [record["loss"] for record in metrics(tmp_path)] == [record["loss"] for record in metrics(whole)]


def test_a_run_on_a_table_resumes_to_the_bytes_of_one_on_json(directory, whole, tmp_path, monkeypatch, capsys):
    rows = [json.loads(line) for line in (directory / "rows.jsonl").read_text().splitlines()]
    with (tmp_path / "rows.csv").open("w", encoding="utf-8-sig", newline="") as file:
        table = csv.DictWriter(file, ["completion", "id", "prompt"])
        table.writerow({"prompt": "a question", "completion": "answer", "id": "id"})
        table.writerows(row | {"id": 1} for row in rows)
    options = {"data": tmp_path / "rows.csv", "columns": "prompt=a question,completion=answer"}
    stop(directory, tmp_path / "out", monkeypatch, **options)
    assert finetune(directory, tmp_path / "out", **options) == 0
    assert_resumed(tmp_path / "out", whole, 3)
    for file in ("rows.csv", "out/held_out.jsonl"):  # whose names are those that the columns were given
        assert cli.main(["eval", f"--adapter={tmp_path / 'out'}", f"--data={tmp_path / file}"]) == 0
    measured = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert_parity(number(measured["value"]), number(summary(whole)["after"]["loss"]))


def test_a_second_signal_does_not_wait_for_the_step(directory, whole, tmp_path, monkeypatch):
    for step, which in ((5, signal.SIGINT), (9, signal.SIGTERM)):
        stop(directory, tmp_path, monkeypatch, step, which, times=2)
    assert finetune(directory, tmp_path) == 0
    assert_resumed(tmp_path, whole, 4, 8)


@pytest.mark.parametrize("step", [0, 4])
def test_what_a_crash_left_after_the_checkpoint_is_dropped(directory, whole, tmp_path, capsys, step):
    unfinished(whole, tmp_path, step)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "los')
    (tmp_path / "checkpoints" / ".step-000006.123.tmp").mkdir()
    assert finetune(directory, tmp_path) == 0
    assert_resumed(tmp_path, whole, step)
    assert ("starting again at step 0" in capsys.readouterr().err) == (step == 0)
    assert not list((tmp_path / "checkpoints").glob(".*"))


# --- refusing ---


@pytest.fixture
def refused(capsys, directory):
    """A function: the run is refused with one line, and not a byte of its directory, or of `unchanged`, changes."""

    def check(out, phrase, unchanged=None, **changes):
        unchanged = unchanged or out
        before = runs.everything(unchanged)
        assert finetune(directory, out, **changes) == 1
        message = capsys.readouterr().err
        assert message.startswith("minilora: ")
        assert message.count("\n") == 1
        assert phrase in message
        assert runs.everything(unchanged) == before

    return check


def test_a_finished_run_is_never_overwritten(refused, whole):
    refused(whole, "holds a finished run with other settings (--lora-r was 3 and is 4); use another", lora_r=4)
    refused(whole, "has a run, and --resume is never", resume="never")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names of files are text")
@pytest.mark.parametrize("place", ["model", "data", "out"])
def test_a_name_that_is_not_utf_8_is_refused_in_one_line_and_leaves_nothing(directory, tmp_path, capsys, place):
    named = tmp_path / "caf\udce9.jsonl"
    named.write_bytes((directory / "rows.jsonl").read_bytes())
    assert finetune(directory, **{"out": tmp_path / "out", "max_steps": 1, place: named}) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("minilora: ")
    assert r"\udce9" in captured.err
    assert captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == [named]


def test_the_command_of_a_finished_run_has_nothing_left_to_do(directory, whole, capsys):
    before = runs.everything(whole)
    assert finetune(directory, whole, save_total_limit=99) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"{whole}: this run is finished")
    assert runs.everything(whole) == before


@pytest.mark.skipif(sys.platform == "win32", reason="there are no locks")
def test_a_directory_in_which_a_process_is_at_work_is_refused_with_its_id(refused, directory, whole, tmp_path):
    unfinished(whole, tmp_path, step=8)
    with locked(tmp_path):
        refused(tmp_path, f"process {os.getpid()} on {platform.node()} is at work there")
    assert finetune(directory, tmp_path) == 0
    assert_resumed(tmp_path, whole, 8)
    assert not (tmp_path / ".lock").exists()


def test_a_directory_is_refused_even_if_the_other_process_has_just_removed_its_lock(tmp_path, monkeypatch):
    def time_out(held):
        raise Timeout(held.lock_file)

    monkeypatch.setattr(lock.FileLock, "acquire", time_out)
    with pytest.raises(ml.TrainingError, match="another process is at work there"), locked(tmp_path):
        pass


def test_of_two_new_runs_in_one_directory_the_second_is_refused_before_it_reads_data(
    directory, tmp_path, monkeypatch, capsys
):
    read_data = command.read_data

    def read_late(*arguments):
        monkeypatch.setattr(command, "read_data", lambda *_: pytest.fail("the second run has read data"))
        assert finetune(directory, tmp_path / "out", max_steps=1) == 1
        assert f"process {os.getpid()} on {platform.node()} is at work there" in capsys.readouterr().err
        return read_data(*arguments)

    monkeypatch.setattr(command, "read_data", read_late)
    assert finetune(directory, tmp_path / "out", max_steps=1) == 0


@pytest.mark.parametrize("is_there", [False, True])
def test_a_run_that_fails_before_it_starts_leaves_nothing(directory, tmp_path, capsys, is_there):
    if is_there:
        (tmp_path / "out").mkdir()
    (tmp_path / "rows.jsonl").write_text("{}")
    assert finetune(directory, tmp_path / "out", data=tmp_path / "rows.jsonl") == 1
    assert f"{tmp_path / 'rows.jsonl'}:1: " in capsys.readouterr().err
    assert (tmp_path / "out").exists() == is_there
    assert not any((tmp_path / "out").glob("*"))


@pytest.mark.parametrize(
    ("out", "phrase"),
    [
        ("other", "holds files, but no run; give another --out"),
        ("other/thesis.txt", "found a file, need a directory"),
        ("other/thesis.txt/out", "cannot be written (Not a directory)"),
    ],
)
def test_what_is_no_place_for_a_run_is_refused_before_the_model_is_loaded(refused, tmp_path, monkeypatch, out, phrase):
    monkeypatch.setattr(command, "load_adapted", lambda *arguments: pytest.fail("the model was loaded"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("all of it")
    refused(tmp_path / out, f"{tmp_path / out}: {phrase}", unchanged=tmp_path)


def test_a_run_with_other_settings_is_refused_and_each_difference_named(refused, directory, whole, tmp_path):
    unfinished(whole, tmp_path, step=4)
    refused(tmp_path, "--learning-rate was 0.01 and is 0.5", learning_rate=0.5)
    refused(tmp_path, "0.5, --seed was 0 and is 7)", learning_rate=0.5, seed=7)
    refused(
        tmp_path, "the data changed since the run began: general.jsonl, rows.jsonl", data=directory / "general.jsonl"
    )


def copied(directory, tmp_path):
    shutil.copytree(directory / "model", tmp_path / "model")
    return {"model": tmp_path / "model", "data": shutil.copy(directory / "rows.jsonl", tmp_path / "rows.jsonl")}


def test_a_run_whose_base_tokenizer_or_template_was_replaced_is_refused(
    refused, directory, tmp_path, monkeypatch, capsys
):
    paths = copied(directory, tmp_path) | {"prompt_style": tmp_path / "style.jinja"}
    paths["prompt_style"].write_text("{{ messages[0].content }}!")
    stop(directory, tmp_path / "out", monkeypatch, **paths)
    capsys.readouterr()
    files = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    changed = {f"model/{file}": tmp_path / "model" / file for file in files} | {"--prompt-style": paths["prompt_style"]}
    for name, path in changed.items():
        before = path.read_bytes()
        last = before[-1] ^ (3 if before.endswith(b"\n") else 1)  # a line end becomes a tab
        path.write_bytes(before[:-1] + bytes([last]))
        refused(tmp_path / "out", f"changed since the run began: {name}; use another directory", **paths)
        path.write_bytes(before)


def test_a_run_is_the_same_wherever_it_and_its_files_lie(directory, whole, tmp_path, monkeypatch):
    unfinished(whole, tmp_path / "moved", step=4)
    copied(directory, tmp_path)
    monkeypatch.chdir(tmp_path)
    assert finetune(directory, "./moved/", model="model/", data="../" + tmp_path.name + "/rows.jsonl") == 0
    weights = runs.ADAPTER[1:]  # the config has the place of the base
    assert contents(tmp_path / "moved", weights) == contents(whole, weights)
    assert starts(tmp_path / "moved") == [0, 4]


def test_a_file_that_is_large_is_known_by_its_size_and_evenly_spread_parts(tmp_path, monkeypatch):
    path, hashes = tmp_path / "large", set()
    monkeypatch.setattr(run_directory, "WHOLE", 1000)
    monkeypatch.setattr(run_directory, "PIECE", 10)
    for place, size in ((0, 50_000), (9, 50_000), (49_999, 50_000), (49_999, 50_001)):
        content = bytearray(size)
        content[place] = 1
        path.write_bytes(content)
        hashes.add(run_directory.hash_of(path))
    assert len(hashes) == 4


def test_a_run_keeps_the_dtype_that_it_began_with_on_a_machine_where_another_is_faster(
    directory, whole, tmp_path, monkeypatch
):
    unfinished(whole, tmp_path, step=4)
    monkeypatch.setattr(checkpoint, "_has_fast_bfloat16", lambda device: True)
    monkeypatch.setattr(checkpoint, "stored_dtype", lambda source: "bfloat16")
    assert finetune(directory, tmp_path) == 0
    assert_resumed(tmp_path, whole, 4)


def test_a_run_that_is_not_finished_is_no_adapter(whole, tmp_path, capsys):
    unfinished(whole, tmp_path, step=4)
    assert cli.main(["generate", f"--adapter={tmp_path}", "--prompt=a"]) == 1
    assert f"{tmp_path}: is an unfinished run" in capsys.readouterr().err


# --- what is measured and told ---


def test_eval_data_are_the_held_out_rows_and_their_bytes_belong_to_the_run(directory, tmp_path, monkeypatch, capsys):
    rows = runs.write_rows(tmp_path / "my_val.jsonl", 5)
    stop(directory, tmp_path / "out", monkeypatch, eval_data=rows)
    assert "23 rows to learn from, 5 held out" in capsys.readouterr().err
    assert set(json.loads((tmp_path / "out" / "run.json").read_text())["data_sha256"]) == {"rows.jsonl", rows.name}
    runs.write_rows(rows, 6)
    assert finetune(directory, tmp_path / "out", eval_data=rows) == 1
    assert "the data changed since the run began: my_val.jsonl" in capsys.readouterr().err


def test_eval_data_that_are_trained_on_or_beside_a_test_split_are_refused(directory, tmp_path, capsys):
    for split in ("train", "test"):
        runs.write_rows(tmp_path / f"{split}.jsonl", 5)
    for data, phrase in (
        (directory / "rows.jsonl", "rows.jsonl: is in data and in --eval-data"),
        (tmp_path, f"the data has a test split already, {tmp_path}/test.jsonl"),
    ):
        assert finetune(directory, tmp_path / "out", data=data, eval_data=directory / "rows.jsonl") == 1
        assert phrase in capsys.readouterr().err


def test_a_run_reports_loss_and_divergence_on_general_text(capsys, directory, tmp_path):
    assert finetune(directory, tmp_path / "a", general_data=directory / "general.jsonl", max_steps=2) == 0
    model = ml.load_model(directory / "model")
    ml.load_adapter(model, tmp_path / "a")
    general = load_general(str(directory / "general.jsonl"), ml.load_tokenizer(directory / "model"), ml.DataConfig())
    found, expected = summary(tmp_path / "a")["general"], dataclasses.asdict(measure_forgetting(model, general))
    assert found.keys() == expected.keys()
    assert_parity(number(list(found.values())), number(list(expected.values())))
    told = capsys.readouterr().out
    assert told.splitlines()[0].split() == ["held-out", "loss"]  # no accuracy, as 4 rows with 2 answers have no choices
    line = f"general text: loss {found['before']:.4f} -> {found['after']:.4f}, KL to the base {found['kl']:.4f}\n"
    share = math.exp(-found["kl"])
    meaning = f"  (KL: a token drawn from the base is {share:.2g} times as likely as before, a geometric mean)\n"
    assert f"{line}{meaning if share <= 0.95 else ''}" in told


def test_base_and_adapter_answer_held_out_rows_and_three_are_shown_whole(capsys, directory, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "50")
    assert finetune(directory, tmp_path, samples=3, max_steps=3, learning_rate=0.1) == 0
    told, data = capsys.readouterr().err, inputs(directory, eval_split=0.2)
    lines = (directory / "rows.jsonl").read_text().splitlines()
    base, result = ml.load_model(directory / "model"), ml.load_model(directory / "model")
    ml.load_adapter(result, tmp_path)
    expected, shown = [], []
    for example in data.test:
        row = json.loads(lines[int(example.source.rpartition(":")[2]) - 1])
        row["wanted"], limit = row["completion"], 2 * example.labelled + 16
        expected.append(row)
        if len(expected) > 3:
            continue
        for key, prefix, model in (("base", "base_", base), ("text", "", result)):
            (ids,) = ml.generate(model, [prompt_of(example)], limit, stop_ids=data.tokenizer.stop_ids)
            reason = "length" if len(ids) == limit else "stop"
            row |= {key: data.tokenizer.decode(ids), f"{prefix}finish_reason": reason}
        shown.append(shorten(row["prompt"], 50, keeps_end=True))
        for name, key in (("wanted", "wanted"), ("base", "base"), ("adapter", "text")):
            shown.append(f"{name} -> {printable(row[key])}")
    assert [json.loads(line) for line in (tmp_path / "held_out.jsonl").read_text().splitlines()] == expected
    assert len(expected) == 4
    assert any(row["base"] != row["text"] for row in expected[:3])
    assert "".join("".join(shown).split()) in "".join(told.split())  # broken into lines
    assert max(map(len, told.splitlines()[-15:-3])) <= 50  # then what to try next
    assert cli.main(["eval", f"--adapter={tmp_path}", f"--data={tmp_path / 'held_out.jsonl'}"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rows"] == 4
    assert_parity(number(found["value"]), number(summary(tmp_path)["after"]["loss"]))


def test_held_out_rows_of_every_form_are_answered_as_generate_answers_them(capsys, tmp_path):
    """Also rows that share a line, or come after one that cannot be used; plain text asks nothing."""
    runs.write_chat_models(tmp_path)
    user, answer = {"role": "user", "content": "the cat?"}, {"role": "assistant", "content": "sat"}
    rows = [
        {"messages": [user, answer, user, {**answer, "content": "by the sea"}]},
        {"prompt": 1},
        {"instruction": "the sea?", "input": "a town", "output": "yes"},
        {"text": "the cat sat"},
        {"prompt": [user], "completion": [answer], "id": 7},
        {"prompt": "the town?", "completion": " no"},
        {"messages": [user, answer, user]},
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    changes = {"data": runs.write_rows(tmp_path / "train.jsonl", 4), "eval_data": tmp_path / "rows.json"}
    changes |= {"model": tmp_path / "chat", "samples": 4, "max_steps": 1, "skip_bad_rows": True, "system": ""}
    assert finetune(tmp_path, tmp_path / "out", **changes) == 0
    file = tmp_path / "out" / "held_out.jsonl"
    found = [json.loads(line) for line in file.read_text().splitlines()]
    asked = [rows[i] for i in (0, 2, 4, 5)]
    assert [{key: row[key] for key in fields} for row, fields in zip(found, asked, strict=True)] == asked
    assert [row["wanted"] for row in found] == ["by the sea", "yes", "sat", " no"]
    assert "a town" in found[1]["prompt"]
    capsys.readouterr()
    words = [f"--adapter={tmp_path / 'out'}", f"--prompts={file}", "--compare-base", "--max-new-tokens=64"]
    assert cli.main(["generate", *words]) == 0
    again = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for row, other in zip(found, again, strict=True):
        for key, reason in (("base", "base_finish_reason"), ("text", "finish_reason")):
            assert other[key].startswith(row[key].rstrip("\ufffd"))
            assert row[reason] == "length" or row[key] == other[key]


def test_the_best_adapter_is_written(capsys, directory, tmp_path):
    """What is evaluated contradicts what is learned, so that the loss does not fall for long."""
    for split, choices in (("train", ("yes",)), ("valid", ("no the sea",)), ("test", ("no the sea",))):
        runs.write_rows(tmp_path / f"{split}.jsonl", 20, choices)
    out, options = tmp_path / "out", {"data": tmp_path, "max_steps": 6, "save_total_limit": 99}
    options |= {"eval_steps": 1, "save_steps": 1, "lr_scheduler": "constant", "keep": "best"}
    options |= {"learning_rate": 0.1, "lora_dropout": 0}
    assert finetune(directory, out, **options) == 0
    losses = {record["step"]: record["eval_loss"] for record in metrics(out) if "eval_loss" in record}
    best = min(losses, key=losses.get)
    assert best < 6
    assert (summary(out)["kept_step"], summary(out)["steps"]) == (best, 6)
    assert_parity(number(summary(out)["after"]["loss"]), number(losses[best]))
    told = capsys.readouterr().err
    assert f"the adapter of step {best} had the lowest loss" in told
    checkpoint = out / "checkpoints" / f"step-{best:06d}"
    assert (out / runs.ADAPTER[1]).read_bytes() == (checkpoint / runs.ADAPTER[1]).read_bytes()


def test_bad_rows_and_rows_with_control_tokens_are_counted(capsys, directory, tmp_path):
    rows = (directory / "rows.jsonl").read_text() + '{"prompt": 1}\n' * 7
    rows += json.dumps({"prompt": f"a{EOS}b", "completion": " c"}) + "\n"
    (tmp_path / "rows.jsonl").write_text(rows)
    data = {"data": tmp_path / "rows.jsonl", "max_steps": 1, "eval_split": 0}
    assert finetune(directory, tmp_path / "a", **data) == 1
    assert "rows.jsonl:24: " in capsys.readouterr().err
    assert finetune(directory, tmp_path / "b", **data, skip_bad_rows=True) == 0
    told = capsys.readouterr().err
    assert "skipped 7 training rows that cannot be used:" in told
    shown = [line.partition(": ")[0][-2:] for line in told.splitlines() if "found the fields" in line]
    assert shown == ["24", "25", "26", "27", "28"]
    assert "1 training rows have control tokens in their text; they act only with --allow-special" in told


def test_a_resumed_run_renders_the_date_of_its_first_start(directory, tmp_path, monkeypatch):
    style = tmp_path / "dated.jinja"
    style.write_text(
        "{{ strftime_now('%Y-%m-%d') }}: {% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    )
    rows = [{"instruction": f"Say {i}.", "output": "It."} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"data": tmp_path / "rows.jsonl", "prompt_style": style, "max_steps": 4}
    assert finetune(directory, tmp_path / "whole", **options) == 0
    stop(directory, tmp_path / "late", monkeypatch, step=2, **options)
    record = json.loads((tmp_path / "late" / "run.json").read_text())
    began = datetime.fromisoformat(record["starts"][0]["time"])
    assert abs(datetime.now(UTC) - began) < timedelta(minutes=5)
    later = datetime.now() + timedelta(days=40)
    monkeypatch.setattr(template, "datetime", SimpleNamespace(now=lambda: later))
    assert finetune(directory, tmp_path / "late", **options) == 0
    assert contents(tmp_path / "late") == contents(tmp_path / "whole")
