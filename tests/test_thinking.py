"""Thoughts: a run records whether its answers had some, and every command asks for answers as they were trained."""

import json

import pytest

import minilora as ml
from minilora.cli.generate import encode_prompts
from minilora.cli.load import find_sources
from minilora.models.prompts import Prompts
from minilora.runs import evaluate
from minilora.runs.encoders import encode_rows
from minilora.runs.formats import Row
from minilora.runs.inputs import find_questions
from tests.chat_templates import QWEN3
from tests.models import tiny_model
from tests.runs import finetune, runner, type_in, write_chat_models
from tests.text import CLOSE, conversation, write_tokenizer

QUESTION = conversation([("the sea", "")])[:-1]
WITHOUT = {"messages": conversation([("the sea", "yes")])}
WITH = {"messages": [*QUESTION, {"role": "assistant", "content": "yes", "reasoning_content": "hm"}]}
ROWS = {"with": [WITH] * 4, "without": [WITHOUT] * 4, "mixed": [WITH, WITHOUT] * 2}
THINKING = {"with": True, "without": False, "mixed": None}
OPTIONS = {"model": None, "quantize": None, "double_quant": None, "raw": None, "system": None}


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Models whose template asks in two ways, `thinker`, or in one, `chat`; a run from `thinker` on each of `ROWS`."""
    directory = write_chat_models(tmp_path_factory.mktemp("thinking"))
    tokenizer = write_tokenizer(directory / "thinker", template=QWEN3, eos=CLOSE)
    ml.save_model(tiny_model(vocab_size=400, num_hidden_layers=2), directory / "thinker", tokenizer)
    for name, rows in ROWS.items():
        data = write_jsonl(directory / f"{name}.jsonl", rows)
        settings = {"max_steps": 1, "eval_split": 0, "model": directory / "thinker", "data": data}
        assert finetune(directory, directory / "run" / name, **settings) == 0
    return directory


@pytest.fixture
def run(runs, capsys, monkeypatch):
    return runner(runs, capsys, monkeypatch)


def prompts(runs):
    """The tokens that ask for an answer, with thoughts, without them, and as the template does by default."""
    tokenizer = ml.load_tokenizer(runs / "thinker")
    ways = {way: tokenizer.encode_chat(QUESTION, True, enable_thinking=way) for way in (True, False, None)}
    assert ways[None] == ways[True] != ways[False]
    return ways


@pytest.mark.parametrize("name", ROWS)
def test_a_model_is_asked_as_it_was_trained_or_as_the_flag_says(runs, name):
    adapter = runs / "run" / name
    assert ml.load_tokenizer(adapter).prompts == Prompts(thinking=THINKING[name])
    for flag in (None, True, False):
        options = {**OPTIONS, "adapter": [str(adapter)], "thinking": flag}
        (asked,) = encode_prompts([Row({"prompt": "the sea"}, "x")], find_sources(options).tokenizer, options)
        assert asked == prompts(runs)[THINKING[name] if flag is None else flag]


def test_chat_asks_as_generate_does(runs, run, monkeypatch):
    replies = {}
    for flags in ([], ["--thinking"], ["--no-thinking"]):
        words = ("--adapter", runs / "run" / "without", "--max-new-tokens=9", *flags)
        type_in(monkeypatch, "the sea\n")
        replies[tuple(flags)] = run("chat", *words).out
        assert run("generate", "--prompt=the sea", *words).out == replies[tuple(flags)]
    assert replies[()] == replies[("--no-thinking",)] != replies[("--thinking",)]


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("flag", [None, True, False])
def test_an_exact_match_is_asked_for_alike_and_compares_what_follows_the_thoughts(runs, run, monkeypatch, name, flag):
    asked = []

    def think(model, tokenizer, prompts, limits, progress):
        asked.extend(zip(prompts, limits, strict=True))
        return [tokenizer.encode("what?</think> yes")] * len(prompts)

    monkeypatch.setattr(evaluate, "write_answers", think)
    flags = {None: (), True: ("--thinking",), False: ("--no-thinking",)}[flag]
    words = ("--adapter", runs / "run" / name, "--data", runs / f"{name}.jsonl", "--metric=exact-match")
    assert json.loads(run("eval", *words, *flags).out)["value"] == 1
    way = THINKING[name] if flag is None else flag
    ways = [True, False] * 2 if way is None else [way] * 4  # a model of both is asked for each row's own
    assert [prompt for prompt, _ in asked] == [prompts(runs)[way] for way in ways]
    assert [limit > evaluate.THOUGHTS for _, limit in asked] == ways


def test_the_flag_is_refused_where_it_decides_nothing(run):
    for words in (("generate", "--model=chat", "--prompt=a"), ("chat", "--model=chat")):
        assert (
            "need a chat template that can ask for answers with and without thoughts"
            in run(*words, "--no-thinking", status=1).err
        )
    words = ("eval", "--model=thinker", "--data=with.jsonl", "--thinking")
    assert "need --metric exact-match" in run(*words, status=1).err


def test_a_dry_run_shows_what_the_template_makes_of_thoughts(runs, run, tmp_path):
    answers = [{"role": "assistant", "content": "no", "reasoning_content": f"so{i}"} for i in range(2)]
    rows = [
        {"messages": [*QUESTION, answers[0], *QUESTION, *last]}
        for last in (answers[1:], conversation([("", "yes")])[1:])
    ]
    words = ("--model=thinker", "--data", write_jsonl(tmp_path / "rows.jsonl", rows), "--eval-split=0", "--dry-run")
    shown = run("finetune", *words, "--out", tmp_path / "out")
    assert "2 training rows have thoughts in earlier answers, which the template leaves out" in shown.err
    assert "so0" not in shown.out
    assert f"assistant\n⟦<think>\nso1\n</think>\n\nno{CLOSE}\n⟧" in shown.out
    assert f"assistant\n<think>\n\n</think>\n\n⟦yes{CLOSE}\n⟧" in shown.out
    assert "leaves out" not in run("finetune", *words[:1], "--data=with.jsonl", *words[3:]).err


def test_what_is_made_of_an_adapter_keeps_how_it_is_asked_and_says_so(runs, run, tmp_path):
    for name, way in THINKING.items():
        said = run("merge", "--adapter", runs / "run" / name, "--out", tmp_path / name).err
        assert ml.load_tokenizer(tmp_path / name).prompts.thinking is way
        card = run("push", tmp_path / name, "me/mine", "--dry-run").out
        for text in (said, card):
            assert (f"enable_thinking={way}" in text) == (way is not None) == ("enable_thinking" in text)


def test_held_out_rows_are_asked_as_they_would_be_learned(runs):
    rows, tokenizer = [Row(WITH, "a"), Row(WITHOUT, "b")], ml.load_tokenizer(runs / "thinker")
    questions = find_questions(rows, encode_rows(rows, tokenizer, ml.DataConfig()), tokenizer, ml.DataConfig())
    assert [question.tokens for question in questions] == [prompts(runs)[True], prompts(runs)[False]]
