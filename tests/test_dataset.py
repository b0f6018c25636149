"""Rows as arrays, in memory and on the disk: the same as encoded one by one, kept whole or not at all, and lean."""

import json
import pickle
import random
import re
import sys
import tracemalloc
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import minilora as ml
from minilora import storage
from minilora.data import IGNORE_INDEX
from minilora.durable import CACHE_DIR, MANIFEST
from minilora.runs import dataset, inputs
from minilora.runs.checkpoints import fingerprint
from minilora.runs.dataset import ROW, Dataset, build_dataset, open_dataset
from minilora.runs.encoders import TextEncoder
from minilora.runs.evaluate import find_choices
from minilora.runs.formats import Row
from minilora.runs.inputs import load_data
from minilora.runs.objective import check_examples
from minilora.runs.seeded import plan_steps
from tests.models import long, tiny_model
from tests.ranks import CONTEXT
from tests.runs import contents, everything, finetune, interrupt, runner, write_rows
from tests.text import BOS, CHATML, CLOSE, conversation

ROWS = [  # plain, a conversation, cut, without a label that is left, with a control token, bad in two ways, and others
    {"prompt": "the", "completion": " cat"},
    {"messages": conversation([("what?", "the sea"), ("and?", "the town")])},
    {"prompt": "the cat sat on the mat; ", "completion": "the dog ate the food. the end. the cat sat on the mat"},
    {"prompt": "the cat sat on the mat; the dog ate the food. the end. the cat sat on the mat", "completion": "yes"},
    {"prompt": f"the {BOS}", "completion": "cat"},
    {"prompt": "the"},
    {"text": "the town by the sea"},
    {"messages": conversation([("what?", "")])},
    {"instruction": "say", "input": "it", "output": "it"},
]


class Inline:
    """An executor that encodes in this process when it is asked for a result."""

    def __init__(self, count, context, begin, arguments):
        (dataset._encoder,) = arguments

    def __enter__(self):
        return self

    def __exit__(self, *_):
        del dataset._encoder

    def submit(self, function, rows):
        return SimpleNamespace(result=partial(function, rows))


@pytest.fixture
def inline(monkeypatch):
    """All files are large, and no process is started."""
    monkeypatch.setattr(dataset, "ProcessPoolExecutor", Inline)
    monkeypatch.setattr(inputs, "LARGE", 0)


def one_by_one(rows, encode):
    """The examples and counts as they follow from the rows one by one."""
    kept, bad, counts = [], [], dict.fromkeys(("truncated", "unlabelled", "lost", "quoted", "conversations"), 0)
    for row in rows:
        try:
            if row.problem:
                raise ml.DataError(row.problem)
            whole, names = encode(row)
        except ml.DataError as error:
            bad.append(f"{row.source}: {error}")
            continue
        limit = encode.config.max_length
        cut = replace(whole, tokens=whole.tokens[:limit], labels=whole.labels[:limit])
        for name in {*names} & counts.keys():
            counts[name] += 1
        counts["truncated"] += len(whole.tokens) > limit
        counts["lost"] += whole.labelled - cut.labelled
        counts["unlabelled"] += not cut.labelled
        kept += [cut] if cut.labelled else []
    return kept, {**counts, "bad": tuple(bad)}


def encoder(tokenizer, kind, **options):
    return TextEncoder(tokenizer(template=CHATML, eos=CLOSE), ml.DataConfig(train_on=kind, **options)), ROWS


@pytest.mark.parametrize("kind", ["completion", "assistant", "all"])
@pytest.mark.parametrize("is_kept", [False, True])
def test_rows_and_counts_are_those_of_the_rows_encoded_one_by_one(
    tmp_path, tokenizer, monkeypatch, inline, kind, is_kept
):
    monkeypatch.setattr(dataset, "PART", 2)
    encode, fields = encoder(tokenizer, kind, max_length=20, skip_bad_rows=True)
    rows = [Row(row, f"{'ab'[i % 2]}:{i}") for i, row in enumerate(fields * 2)]
    rows += [Row(problem="none", source="c:1"), Row(fields[0], "d"), Row(fields[0], "d:07")]
    if is_kept:
        (tmp_path / "kept").mkdir()
    found = build_dataset(rows, encode, tmp_path / "kept" if is_kept else None)
    kept, counts = one_by_one(rows, encode)
    assert list(found) == kept
    assert {name: getattr(found, name) for name in counts} == counts
    assert all(counts[name] for name in ("truncated", "bad", "quoted"))
    assert found.lengths.tolist() == [len(example.tokens) for example in kept]
    assert found.labelled.tolist() == [example.labelled for example in kept]
    assert found.rows["largest"].tolist() == [max(e.tokens + e.labels) for e in kept]
    assert repr(found).startswith(f"Dataset({len(kept)} rows, {sum(len(e.tokens) for e in kept)} tokens, ")


def test_a_dataset_is_a_sequence_of_examples(tokenizer):
    found = build_dataset(
        [Row({"text": text}, f"f:{i}") for i, text in enumerate("abcde")], encoder(tokenizer, "all")[0]
    )
    rows = list(found)
    assert [row.source for row in rows] == [f"f:{i}" for i in range(5)]
    assert (found[-1], found[np.int64(2)], len(found[1:4])) == (rows[-1], rows[2], 3)
    assert isinstance(found[1:], ml.Dataset)
    assert list(found[4:0:-2]) == rows[4:0:-2]
    assert list(found[3:][1:]) == rows[4:]
    assert (len(Dataset()), list(Dataset()), repr(Dataset())[:23]) == (0, [], "Dataset(0 rows, 0 token")
    with pytest.raises(IndexError):
        found[5]


# --- files ---


def write_lines(path, rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def load(path, tokenizer, folder, training=None, show=None, eval_split=0.2, **reading):
    options = {"eval_split": eval_split, "folder": folder, "show": show}
    return load_data([str(path)], tokenizer, ml.DataConfig(**reading), training or ml.TrainConfig(), **options)


@pytest.fixture
def rows(tmp_path):
    """A file of 23 rows, with few answers."""
    return write_rows(tmp_path / "rows.jsonl", 23)


@pytest.mark.parametrize("start", ["forkserver", *long("spawn")])  # the latter is what users have, and slow
def test_rows_that_several_processes_encode_keep_their_order(tmp_path, tokenizer, monkeypatch, start):
    if start == "forkserver":
        monkeypatch.setattr(dataset, "get_context", lambda _: CONTEXT)
    monkeypatch.setattr(dataset, "PROCESSES", 2)
    monkeypatch.setattr(inputs, "LARGE", 0)
    monkeypatch.setattr(dataset, "PART", 40)
    path = write_lines(tmp_path / "rows.jsonl", ROWS * 40)
    chosen, told = tokenizer(template=CHATML, eos=CLOSE), []
    reading = {"max_length": 20, "skip_bad_rows": True, "eval_split": 0}
    found, expected = (load(path, chosen, folder, show=told.append, **reading) for folder in (tmp_path / "f", None))
    assert list(found.train) == list(expected.train)
    assert found.train.bad == expected.train.bad
    assert told == [f"encoding {path}: {line} of 360 lines" for line in range(40, 361, 40)]
    with pytest.raises(ml.DataError) as error:
        load(path, chosen, tmp_path / "g")
    assert str(error.value) == expected.train.bad[0]
    assert not list((tmp_path / "g").iterdir())


@pytest.mark.parametrize("training", [{}, {"keep": "best", "eval_steps": 1}])
def test_what_is_kept_in_files_is_what_would_be_in_memory_and_the_same_rows_are_held_out(
    tmp_path, tokenizer, inline, rows, training
):
    training = ml.TrainConfig(seed=3, **training)
    found, expected = (load(rows, tokenizer(), folder, training) for folder in (tmp_path / "f", None))
    for name in ("train", "valid", "test"):
        assert list(getattr(found, name)) == list(getattr(expected, name))
    assert (found.choices, found.files) == (expected.choices, expected.files)
    whole = list(load(rows, tokenizer(), None, eval_split=0).train)
    shuffled = random.Random(3).sample(whole, len(whole))
    assert list(found.test) == shuffled[:4]
    assert list(found.train) == shuffled[8 if training.selects else 4 :] or training.selects
    assert len(found.choices) == 2


def keys(folder):
    return {path.name for path in folder.iterdir()}


def test_rows_are_encoded_once_and_again_if_anything_that_they_follow_from_changes(
    tmp_path, tokenizer, inline, monkeypatch, rows
):
    calls, encode_part = [], dataset.encode_part
    monkeypatch.setattr(dataset, "encode_part", lambda *given: calls.append(given) or encode_part(*given))
    folder, plain = tmp_path / "out" / CACHE_DIR, tokenizer()
    chat = tokenizer(template=CHATML, eos=CLOSE)
    first = load(rows, plain, folder)
    for _ in range(2):
        assert list(load(rows, plain, folder, eval_split=0.1, training=ml.TrainConfig(seed=1)).train)
    assert len(calls) == 1
    changes = [
        (rows, chat, {}),
        (rows, plain, {"max_length": 7}),
        (rows, plain, {"train_on": "all"}),
        (rows, plain, {"text_field": "prompt"}),
        (rows, plain, {"allow_special": True}),
        (rows, plain, {"skip_bad_rows": True}),
        (rows, plain, {"prompt_style": "instruction"}),
        (rows, chat.with_template(CHATML + " "), {}),
        (rows, plain.with_tokens(["cat"]), {}),
        (write_rows(tmp_path / "other.jsonl", 23), plain, {}),
    ]
    for number, (path, chosen, reading) in enumerate(changes, start=2):
        load(path, chosen, folder, **reading)
        assert len(calls) == number
    assert len(keys(folder)) == len(changes) + 1
    write_lines(rows, [{"prompt": "the", "completion": " end"}] * 9)
    changed = load(rows, plain, folder)
    assert len(changed.train) + len(changed.test) == 9 != len(first.train)


def test_a_template_that_writes_the_date_has_another_key_when_it_would_write_another(tokenizer):
    written, hidden = '{{ strftime_now("%d %b %Y") }}' + CHATML, "{% set f = '%d' %}{{ strftime_now(f) }}" + CHATML
    moments = [datetime(2026, 7, 26, 9), datetime(2026, 7, 26, 10), datetime(2026, 7, 27, 9)]
    for template, expected in ((CHATML, 1), (written, 2), (hidden, 3)):
        assert len({tokenizer(template=template).at(now).key for now in moments}) == expected


def test_a_copy_of_a_tokenizer_in_another_process_encodes_the_same(tokenizer):
    chosen = tokenizer(template=CHATML, eos=CLOSE).with_tokens(["<new>"]).with_template(CHATML.strip() + "!")
    copy = pickle.loads(pickle.dumps(chosen.at(datetime(2026, 1, 1))))
    messages = conversation([("what <new>?", f"the {CLOSE} sea")])
    assert copy.encode_chat(messages) == chosen.encode_chat(messages)
    assert (copy.key, copy.eos_id, copy.stop_ids) == (chosen.key, chosen.eos_id, chosen.stop_ids)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-4])


def flip(path):
    content = path.read_bytes()
    path.write_bytes(content[:5] + bytes([content[5] ^ 1]) + content[6:])


@pytest.mark.parametrize("name", ["tokens.bin", "labels.bin", "rows.bin", "counts.json", MANIFEST])
@pytest.mark.parametrize("damage", [truncate, flip, Path.unlink])
def test_damaged_files_are_not_used_and_are_written_again(tmp_path, tokenizer, inline, rows, name, damage):
    folder = tmp_path / "out" / CACHE_DIR
    expected = list(load(rows, tokenizer(), folder).train)
    before = everything(folder)
    (file,) = folder.glob(f"*/{name}")
    damage(file)
    assert list(load(rows, tokenizer(), folder).train) == expected
    assert everything(folder) == before


def test_what_a_killed_process_has_written_is_not_used(tmp_path, tokenizer, inline, rows, monkeypatch):
    folder = tmp_path / "out" / CACHE_DIR

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("minilora.durable.remove", lambda path: None)  # as a process that is killed removes nothing
        patch.setattr("minilora.durable.os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            load(rows, tokenizer(), folder)
    assert [path.name[0] for path in folder.iterdir()] == ["."]
    assert len(load(rows, tokenizer(), folder).train) == 19


def test_the_run_beside_it_may_have_the_rows_already_if_it_is_ours(tmp_path, tokenizer, inline, rows, monkeypatch):
    one, other, third = (tmp_path / name / CACHE_DIR for name in ("one", "other", "third"))
    expected = list(load(rows, tokenizer(), one).train)
    assert list(load(rows, tokenizer(), other).train) == expected
    assert not other.exists()
    monkeypatch.setattr(dataset.os, "getuid", lambda: one.stat().st_uid + 1, raising=False)
    load(rows, tokenizer(), third)
    assert keys(third) == keys(one)


def test_the_fingerprint_is_that_of_the_examples_in_memory_and_of_the_files_otherwise(
    tmp_path, tokenizer, inline, rows
):
    def of(data, held=()):
        return fingerprint(data, held, ml.TrainConfig(), {})

    memory = load(rows, tokenizer(), None).train
    assert of(memory) == of(list(memory))
    first, again = (load(rows, tokenizer(), tmp_path / name / CACHE_DIR).train for name in "ab")
    assert of(first) == of(again) != of(memory)
    longer = load(rows, tokenizer(), tmp_path / "a" / CACHE_DIR, max_length=10**6).train
    assert of(longer) == of(first)  # the same tokens
    others = [first[1:], first[::-1], load(rows, tokenizer(), tmp_path / "a" / CACHE_DIR, train_on="all").train]
    exchanged = first.rows.copy()
    one, other = np.flatnonzero(first.lengths == np.bincount(first.lengths).argmax())[:2]  # of one length
    exchanged[[one, other]] = first.rows[[other, one]]
    others.append(first.take(exchanged))
    assert len({of(first), *map(of, others), of(first, first[:2])}) == 6


def test_a_token_that_the_model_does_not_have_is_found_in_arrays_too(tokenizer, rows):
    model, data = tiny_model(vocab_size=400), load(rows, tokenizer(), None).train
    check_examples(model, data)
    largest = int(data.rows["largest"].max())
    first = next(example for example in data if largest in example.tokens)
    message = f"'{first.source}' holds token {largest}; the model has tokens 0 to {largest - 1}"
    with pytest.raises(ml.DataError, match=re.escape(message)):
        check_examples(tiny_model(vocab_size=largest), data)


def test_choices_are_those_of_all_splits_and_none_where_a_row_has_no_prompt():
    def row(prompt, answer):
        return ml.Example([*prompt, answer], [*[IGNORE_INDEX] * len(prompt), answer])

    few = [row([1], 5), row([1, 2], 6)] * 5
    assert find_choices(few[:3], few[3:]) == [(5,), (6,)]
    assert find_choices(few, [row([], 5)]) is None


# --- memory ---


def peak_of(compute):
    tracemalloc.start()
    try:
        compute()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


class Constant:
    """An encoder that takes no time."""

    config, key = ml.DataConfig(), ""

    def __call__(self, row):
        return ml.Example([7] * 40, [IGNORE_INDEX] * 20 + [7] * 20, row.source), ["completions"]


def test_memory_does_not_grow_with_the_tokens_of_the_rows(tmp_path, tokenizer, inline, monkeypatch):
    monkeypatch.setattr(inputs, "TextEncoder", lambda *_: Constant())
    monkeypatch.setattr(storage, "CHUNK", 2**12)
    monkeypatch.setattr(dataset, "PART", 50)
    peaks = []
    for count in (50, 500, 3_000):  # the first warms up
        path = write_lines(tmp_path / f"{len(peaks)}.jsonl", [{"prompt": "the", "completion": " cat"}] * count)

        def start(path=path):
            data = load(path, tokenizer(), tmp_path / "out" / CACHE_DIR)
            steps = plan_steps(data.train.lengths, ml.TrainConfig(batch_size=2))
            fingerprint(data.train, data.test, ml.TrainConfig(), {})
            assert data.train[steps[0][0][0]].tokens

        peaks += [peak_of(start), peak_of(start)]  # encoding, and the next start
    grown = (peaks[4] - peaks[2], peaks[5] - peaks[3])
    assert max(grown) < 2_500 * 240, grown  # tokens and labels of a row take 320 bytes, as arrays


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux reports it")
def test_rows_that_were_read_do_not_stay_in_memory(tmp_path):
    def resident():
        return int(re.search(r"RssFile:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

    length, count = 50, 2**16  # 13 MB in each file
    tokens = np.arange(length * count, dtype="<i4")
    rows = np.zeros(count, ROW)
    rows["begin"], rows["length"] = np.arange(count) * length, length
    for name, content in (("tokens", tokens), ("labels", tokens), ("rows", rows)):
        content.tofile(tmp_path / f"{name}.bin")
    (tmp_path / "counts.json").write_text('{"files": ["f"]}')
    data = open_dataset(tmp_path)
    (tmp_path / "tokens.bin").unlink()  # as one who needs the room may do
    before = resident()
    for i in range(0, count, 128):  # all pages, some of them by way of those around them
        assert data[i].tokens == data[i].labels == list(range(length * i, length * (i + 1)))
    assert resident() - before < 2**22


# --- runs ---


def test_a_run_on_files_ends_in_the_same_bytes_also_if_it_is_stopped(directory, tmp_path, monkeypatch):
    changes = {"eval_steps": 2, "keep": "best", "max_steps": 4}
    assert finetune(directory, tmp_path / "memory", **changes) == 0
    monkeypatch.setattr(dataset, "ProcessPoolExecutor", Inline)
    monkeypatch.setattr(inputs, "LARGE", 0)
    assert finetune(directory, tmp_path / "files", dry_run=True) == 0
    assert keys(tmp_path / "files") == {CACHE_DIR}
    monkeypatch.setattr(dataset, "encode_part", None)  # all that follow use what the dry run has written
    assert finetune(directory, tmp_path / "files", **changes) == 0
    assert contents(tmp_path / "files") == contents(tmp_path / "memory")
    with monkeypatch.context() as patch:
        interrupt(patch, 3)
        assert finetune(directory, tmp_path / "stopped", **changes) != 0
    assert finetune(directory, tmp_path / "stopped", **changes) == 0
    assert contents(tmp_path / "stopped") == contents(tmp_path / "memory")


def test_what_a_killed_process_left_is_removed_by_the_next_run(directory, tmp_path, inline):
    left = tmp_path / CACHE_DIR / ".key.1.tmp"
    left.mkdir(parents=True)
    (left / "tokens.bin").write_bytes(b"1234")
    assert finetune(directory, tmp_path, max_steps=1) == 0
    assert not left.exists()


def test_progress_is_shown_while_rows_are_encoded(directory, tmp_path, inline, capsys, monkeypatch):
    run = runner(directory, capsys, monkeypatch)
    words = ("--model=model", "--data=rows.jsonl", "--general-data=none", "--dry-run", f"--out={tmp_path}")
    assert run("finetune", *words).err.startswith("encoding rows.jsonl: 23 of 23 lines\n")
    assert "encoding" not in run("finetune", *words).err
