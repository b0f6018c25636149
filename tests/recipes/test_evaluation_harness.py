"""A model of lm-evaluation-harness says what the harness's own model of transformers says."""

import json
import random

import pytest
import torch

import minilora as ml
from minilora.testing.compare import assert_parity
from tests.models import tiny_model
from tests.text import CHATML, write_tokenizer

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]
lm_eval = pytest.importorskip("lm_eval")
huggingface = pytest.importorskip("lm_eval.models.huggingface")
WORDS = ["the", "cat", "sea", "town", "naïve", "?", "\n", "answer", "  by"]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Our model of the harness, and theirs of the same directory."""
    from recipes.evaluation_harness import HarnessModel

    directory = tmp_path_factory.mktemp("model")
    tokenizer = write_tokenizer(directory, template=CHATML)
    ml.save_model(tiny_model(dtype=torch.float32, vocab_size=400), directory, tokenizer)
    ours = HarnessModel(ml.load_model(directory), tokenizer, batch_size=3, max_length=64)
    theirs = huggingface.HFLM(str(directory), batch_size=3, max_length=64, device="cpu", dtype="float32")
    return ours, theirs


def requests(kind, arguments):
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=each, idx=i) for i, each in enumerate(arguments)]


def text(draw, most=12, least=1):
    return " ".join(draw.choices(WORDS, k=draw.randint(least, most)))


def test_log_likelihoods_and_whether_they_are_greedy_are_theirs(both):
    draw = random.Random(0)
    contexts = [f"the {text(draw)}{draw.choice(['', ' '])}" for _ in range(12)]
    pairs = [(context, draw.choice(["", " "]) + text(draw, 4)) for context in contexts]
    pairs += [("", "the cat"), (text(draw, 90, 80), " the sea")]  # no context, and one that is too long
    pairs += [pair for pair in zip(contexts, both[0].write(contexts, max_gen_toks=1), strict=True) if pair[1].isalnum()]
    ours, theirs = (model.loglikelihood(requests("loglikelihood", pairs)) for model in both)
    assert [is_greedy for _, is_greedy in ours] == [is_greedy for _, is_greedy in theirs]
    assert {is_greedy for _, is_greedy in ours} == {True, False}
    assert_parity(*(torch.tensor([log for log, _ in found]) for found in (ours, theirs)))


def test_perplexities_of_long_texts_are_theirs(both):
    draw = random.Random(1)
    texts = [(text(draw, 60, 1),) for _ in range(6)]
    ours, theirs = (model.loglikelihood_rolling(requests("loglikelihood_rolling", texts)) for model in both)
    assert_parity(torch.tensor(ours), torch.tensor(theirs))


def test_texts_up_to_a_stop_are_theirs(both):
    draw = random.Random(2)
    arguments = [(text(draw), {"until": ["e", "\n"], "max_gen_toks": 7, "do_sample": False}) for _ in range(5)]
    arguments += [(text(draw, 80, 70), {"until": ["<|end|>"], "max_gen_toks": 9, "do_sample": False}) for _ in range(4)]
    ours, theirs = (model.generate_until(requests("generate_until", arguments)) for model in both)
    assert ours == theirs
    assert any(ours)


@pytest.mark.parametrize("is_chat", [False, True])
def test_two_tasks_give_the_same_results(both, tmp_path, is_chat):
    draw = random.Random(3)
    rows = [{"question": text(draw), "choices": [" yes", " no, the sea", " town"], "answer": i % 3} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}}}
    choice = {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "answer"}
    greedy = {"output_type": "generate_until", "doc_to_target": "{{choices[0]}}"}
    greedy["generation_kwargs"] = {"until": ["\n"], "max_gen_toks": 5, "do_sample": False}
    shared = {"test_split": "test", "doc_to_text": "{{question}}", **data}
    tasks = [{"task": "choosing", **shared, **choice}, {"task": "writing", **shared, **greedy}]
    settings = {"tasks": tasks, "bootstrap_iters": 0, "log_samples": False, "apply_chat_template": is_chat}
    found = [lm_eval.simple_evaluate(model, **settings)["results"] for model in both]
    assert found[0] == found[1]
    assert {*found[0]} == {"choosing", "writing"}


def test_a_chat_is_rendered_as_theirs(both):
    messages = [{"role": "user", "content": "the cat?"}]
    ours, theirs = (model.apply_chat_template(messages) for model in both)
    assert ours == theirs
