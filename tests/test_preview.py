import json
import re

import pytest

import minilora as ml
from minilora.cli.dry_run import mark_learned
from minilora.data import IGNORE_INDEX
from minilora.runs.encoders import encode_rows
from minilora.runs.formats import Row
from minilora.runs.sampler import plan_steps
from minilora.runs.settings import DataConfig
from tests.models import tiny_model
from tests.runs import runner
from tests.text import CHATML, CLOSE, OPEN, write_tokenizer


@pytest.fixture
def dry_run(directory, capsys, monkeypatch):
    """What a dry run with these flags prints; it holds out no rows and writes nothing."""
    run = runner(directory, capsys, monkeypatch)

    def dry_run(*flags):
        words = ["--dry-run", "--model=model", "--data=rows.jsonl", "--eval-split=0", "--out=out", *flags]
        text = run("finetune", *words).out
        assert not (directory / "out").exists()
        return text

    return dry_run


@pytest.fixture
def data(directory):
    return ml.load_dataset(directory / "rows.jsonl", ml.load_tokenizer(directory / "model"))


def test_the_first_rows_are_shown_whole_with_what_is_learned_between_marks(directory, dry_run, data):
    tokenizer = ml.load_tokenizer(directory / "model")
    shown = re.findall(r"--- (.*?:\d+)\n(.*?⟧)\n", dry_run(), flags=re.DOTALL)
    assert [source for source, _ in shown] == [example.source.replace(f"{directory}/", "") for example in data[:3]]
    for example, (_, row) in zip(data, shown, strict=False):
        assert re.sub("[⟦⟧]", "", row) == tokenizer.decode(example.tokens, skip_special_tokens=False)
        learned = [token for token, label in zip(example.tokens, example.labels, strict=True) if label != IGNORE_INDEX]
        assert re.findall("⟦(.*?)⟧", row) == [tokenizer.decode(learned, skip_special_tokens=False)]


@pytest.mark.parametrize("train_on", ["completion", "assistant", "all"])
def test_marks_enclose_the_answers_of_a_conversation_with_control_tokens(tmp_path, train_on):
    tokenizer = write_tokenizer(tmp_path, template=CHATML, eos=CLOSE)
    messages = [
        *({"role": "user", "content": "the cat"}, {"role": "assistant", "content": " sat  "}),
        *({"role": "user", "content": "é?"}, {"role": "assistant", "content": "🙂"}),
    ]
    example = encode_rows([Row({"messages": messages})], tokenizer, DataConfig(train_on=train_on))[0]
    first = f" sat  {CLOSE}\n"
    text = f"{OPEN}user\nthe cat{CLOSE}\n{OPEN}assistant\n"
    text += f"⟦{first}⟧" if train_on == "assistant" else first
    text += f"{OPEN}user\né?{CLOSE}\n{OPEN}assistant\n⟦🙂{CLOSE}\n⟧"
    text = f"⟦{re.sub('[⟦⟧]', '', text)}⟧" if train_on == "all" else text
    assert mark_learned(example, tokenizer) == text


@pytest.mark.parametrize("flags", [{"epochs": 3, "batch_size": 2}, {"max_steps": 5, "gradient_accumulation_steps": 3}])
def test_steps_rows_tokens_and_parameters_are_those_of_the_run(directory, dry_run, data, flags):
    text = dry_run(*(f"--{name}={value}" for name, value in flags.items()))
    model, config = ml.load_model(directory / "model"), ml.TrainConfig(**flags)
    ml.attach(model, ml.LoraConfig())
    result, count = ml.train(model, data, config), ml.count_parameters(model)
    plan = [rows for micro_batches in plan_steps(len(data), config) for rows in micro_batches]
    labels = sum(data[row].labelled for rows in plan for row in rows)
    figures = f"{result.total_steps} steps, {sum(map(len, plan))} rows, {result.tokens:,} tokens, {labels} of them"
    assert f"the run: {figures} learned" in text
    share = f"{count.trainable:,} of {count.total:,} are trained ({count.trainable / count.total:.2%})"
    assert f"parameters: {share}" in text


TEMPLATE = "the training rows are plain text, so the model's chat template is not used"


@pytest.mark.parametrize("is_plain", [True, False])
def test_plain_rows_for_a_model_with_a_chat_template_are_told_of(tmp_path, capsys, monkeypatch, is_plain):
    model = tiny_model(vocab_size=400, num_hidden_layers=1)
    ml.save_model(model, tmp_path / "chat", write_tokenizer(tmp_path / "chat", template=CHATML, eos=CLOSE))
    row = {"prompt": "a:", "completion": " b"} if is_plain else {"instruction": "a", "output": "b"}
    (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 4)
    words = ["finetune", "--dry-run", "--model=chat", "--data=rows.jsonl", "--eval-split=0"]
    told = runner(tmp_path, capsys, monkeypatch)(*words).err
    assert (TEMPLATE in told) == is_plain
    assert "no row is held out" in told
    assert "no row is held out" not in runner(tmp_path, capsys, monkeypatch)(*words[:-1]).err


@pytest.mark.parametrize("is_repeated", [True, False])
def test_held_out_prompts_that_are_trained_on_too_are_told_of(directory, tmp_path, capsys, monkeypatch, is_repeated):
    for name, prompts in (("train", ["a b", "c", "d"]), ("test", ["A  b ", "c", "e", "f"] if is_repeated else "efgh")):
        lines = [json.dumps({"prompt": f"{prompt}:", "completion": " b"}) for prompt in prompts]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    words = ["finetune", "--dry-run", "--model=model", f"--data={tmp_path}"]
    told = runner(directory, capsys, monkeypatch)(*words).err
    assert ("2 of 4 held-out rows have the prompt of a training row" in told) == is_repeated
    assert ("the prompt of a training row" in told) == is_repeated


def test_what_controls_a_terminal_does_not_reach_it(tmp_path):
    tokenizer = write_tokenizer(tmp_path)
    example = encode_rows(
        [Row({"prompt": "a\x1b[2J\nb", "completion": "\x07c\u3000\u202f!"})], tokenizer, DataConfig()
    )[0]
    assert mark_learned(example, tokenizer) == "a\\x1b[2J\nb⟦\\x07c\u3000\u202f!<|end|>⟧"
