import re

import pytest

import minilora as ml
from minilora import cli
from minilora.cli.preview import marked
from minilora.model.ops import IGNORE_INDEX
from minilora.train.batch import plan_steps
from minilora.train.config import DataConfig
from minilora.train.data import encode_row
from minilora.train.rows import Row
from tests.models import tiny_model
from tests.runs import write_rows
from tests.text import CHATML, CLOSE, OPEN, write_tokenizer


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("preview")
    ml.save_model(tiny_model(vocab_size=400), directory / "model", write_tokenizer(directory / "model"))
    write_rows(directory / "rows.jsonl", 21)
    return directory


def dry_run(directory, capsys, *words):
    rows, out = directory / "rows.jsonl", directory / "out"
    words = [f"--model={directory / 'model'}", "--data", str(rows), f"--out={out}", *words]
    assert cli.main(["finetune", "--dry-run", *words]) == 0
    assert not out.exists()
    return capsys.readouterr().out


def test_the_first_rows_are_shown_whole_with_what_is_learned_between_marks(directory, capsys):
    text = dry_run(directory, capsys, "--eval-split=0")
    tokenizer = ml.load_tokenizer(directory / "model")
    data = ml.load_dataset(directory / "rows.jsonl", tokenizer)
    shown = re.findall(r"--- (.*?:\d+)\n(.*?⟧)\n", text, flags=re.DOTALL)
    assert [source for source, _ in shown] == [example.source for example in data[:3]]
    for example, (_, row) in zip(data, shown, strict=False):
        assert re.sub("[⟦⟧]", "", row) == tokenizer.decode(example.tokens, skip_special_tokens=False)
        learned = [token for token, label in zip(example.tokens, example.labels, strict=True) if label != IGNORE_INDEX]
        assert re.findall("⟦(.*?)⟧", row) == [tokenizer.decode(learned, skip_special_tokens=False)]


@pytest.mark.parametrize("train_on", ["completion", "assistant", "all"])
def test_marks_stand_around_the_answers_of_a_conversation_control_tokens_and_spaces_included(tmp_path, train_on):
    tokenizer = write_tokenizer(tmp_path, template=CHATML, eos=CLOSE)
    messages = [
        *({"role": "user", "content": "the cat"}, {"role": "assistant", "content": " sat  "}),
        *({"role": "user", "content": "é?"}, {"role": "assistant", "content": "🙂"}),
    ]
    example = encode_row(Row({"messages": messages}, ""), tokenizer, DataConfig(train_on=train_on))
    first = f" sat  {CLOSE}\n"
    text = f"{OPEN}user\nthe cat{CLOSE}\n{OPEN}assistant\n"
    text += f"⟦{first}⟧" if train_on == "assistant" else first
    text += f"{OPEN}user\né?{CLOSE}\n{OPEN}assistant\n⟦🙂{CLOSE}\n⟧"
    text = f"⟦{re.sub('[⟦⟧]', '', text)}⟧" if train_on == "all" else text
    assert marked(example, tokenizer, "⟦", "⟧") == text


@pytest.mark.parametrize("words", [["--epochs=3", "--batch-size=2"], ["--max-steps=5", "--batch-tokens=40"]])
def test_steps_rows_tokens_and_parameters_are_those_of_the_run(directory, capsys, tmp_path, words):
    text = dry_run(directory, capsys, *words, "--eval-split=0")
    config = ml.TrainConfig(**{w.split("=")[0].strip("-").replace("-", "_"): int(w.split("=")[1]) for w in words})
    model = ml.load_model(directory / "model")
    ml.attach(model, ml.LoraConfig())
    data = ml.load_dataset(directory / "rows.jsonl", ml.load_tokenizer(directory / "model"))
    result = ml.train(model, data, config)
    plan = [rows for micro_batches in plan_steps([len(e.tokens) for e in data], config) for rows in micro_batches]
    labels = sum(data[row].labelled for rows in plan for row in rows)
    figures = f"{result.total_steps} steps, {sum(map(len, plan))} rows, {result.tokens:,} tokens, {labels} of them"
    assert f"the run: {figures} learned" in text
    count = ml.count_parameters(model)
    assert (
        f"parameters: {count.trainable:,} of {count.total:,} are trained ({count.trainable / count.total:.2%})" in text
    )


def test_rows_that_are_cut_and_those_without_a_label_left_are_counted(directory, capsys):
    data = ml.load_dataset(directory / "rows.jsonl", ml.load_tokenizer(directory / "model"))
    lengths = sorted(len(example.tokens) for example in data)
    limit = lengths[len(lengths) // 2] - 1
    text = dry_run(directory, capsys, f"--max-length={limit}", "--eval-split=0")
    cut, lost = map(int, re.search(r"cut to --max-length: (\d+) training rows, which lost (\d+) labels", text).groups())
    assert cut == sum(length > limit for length in lengths)
    assert lost == sum(sum(label != IGNORE_INDEX for label in example.labels[limit:]) for example in data)
    unused = int(re.search(r"not used: (\d+) training rows", text)[1])
    assert unused == sum(all(label == IGNORE_INDEX for label in example.labels[1:limit]) for example in data)
    assert re.search(rf"training +{len(lengths) - unused} ", text)


def test_what_controls_a_terminal_does_not_reach_it(tmp_path):
    tokenizer = write_tokenizer(tmp_path)
    example = encode_row(Row({"prompt": "a\x1b[2J\nb", "completion": "\x07c"}, ""), tokenizer, DataConfig())
    assert marked(example, tokenizer, "⟦", "⟧") == "a[2J\nb⟦c<|end|>⟧"
