"""Classes of texts by a Llama: what the head reads, that it learns, its files, and PEFT's."""

import json
import random

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import minilora as ml
from minilora.files import read_json
from minilora.testing.compare import assert_maths, assert_parity
from recipes import classify_texts as recipe
from tests import reference_model
from tests.models import document_lengths, examples, perturb_, seeds, tiny_model, token_ids
from tests.text import write_tokenizer

LABELS = ["bad", "good", "so so"]
CONFIG = {"r": 3, "lora_alpha": 7, "modules_to_save": ("score",), "task_type": "SEQ_CLS"}
few = examples(0.2)


def rows_of(tokens, lengths, draw):
    return [recipe.Row(part.tolist(), draw.randrange(3)) for part in tokens.split(lengths)]


@few
@given(seeds, document_lengths)
def test_scores_are_those_of_the_last_token_of_each_text(seed, lengths):
    model = recipe.Classifier(tiny_model(seed=seed), LABELS, seed)
    rows = rows_of(token_ids(seed, sum(lengths)), lengths, random.Random(seed))
    tensors = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    tensors["lm_head.weight"] = tensors["score.weight"]  # to the oracle the classes are a vocabulary
    for row, scores in zip(rows, model(rows), strict=True):
        tables = model.model.config.rope.rotation([range(len(row.tokens))], torch.device("cpu"))
        rotation = [table.numpy() for table in tables]
        expected = reference_model.decoder_logits(tensors, model.model.config, row.tokens, *rotation)
        assert_maths(scores, torch.from_numpy(expected[-1]))


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=30))
@example([(0, 1)])  # of class 1 there is none, class 0 is not predicted, of class 2 neither
def test_accuracy_and_f1_are_those_counted_pair_by_pair(pairs):
    class Fixed:
        """A model that predicts the one token of a row."""

        labels = LABELS

        def eval(self):
            return self

        def __call__(self, rows):
            return torch.nn.functional.one_hot(torch.tensor([row.tokens[0] for row in rows]), 3)

    found = recipe.measure(Fixed(), [recipe.Row([guess], label) for label, guess in pairs])
    f1 = []
    for i in {i for pair in pairs for i in pair}:
        right = sum(pair == (i, i) for pair in pairs)
        f1.append(2 * right / sum((label == i) + (guess == i) for label, guess in pairs))
    assert found["accuracy"] == pytest.approx(sum(label == guess for label, guess in pairs) / len(pairs))
    assert found["macro_f1"] == pytest.approx(sum(f1) / len(f1))


def write_rows(path, count):
    """Texts of random words; the class is a word that is in them."""
    draw, rows = random.Random(count), []
    for _ in range(count):
        label = draw.choice(LABELS)
        words = [*draw.choices(["the", "cat", "sea", "town"], k=draw.randint(1, 4)), label]
        rows.append({"text": " ".join(draw.sample(words, len(words))), "label": label})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_loss_falls_and_a_saved_adapter_has_the_head_and_predicts_the_same(tmp_path):
    tokenizer = write_tokenizer(tmp_path / "base")
    ml.save_model(tiny_model(dtype=torch.float32, vocab_size=400), tmp_path / "base", tokenizer)
    model = recipe.Classifier(ml.load_model(tmp_path / "base"), LABELS)
    rows = recipe.read_rows(write_rows(tmp_path / "train.jsonl", 120), tokenizer, LABELS)
    held_out = recipe.read_rows(write_rows(tmp_path / "test.jsonl", 40), tokenizer, LABELS)
    before = recipe.measure(model, held_out)
    ml.attach(model, ml.LoraConfig(**CONFIG))
    losses = []
    config = ml.TrainConfig(learning_rate=0.02, batch_size=8, epochs=6)
    ml.train(model, rows, config, lambda record: losses.append(record["loss"]), loss=recipe.class_loss)
    after = recipe.measure(model, held_out)
    assert losses[-1] < 0.3 * losses[0]
    assert after["accuracy"] > max(0.8, before["accuracy"])
    ml.save_adapter(model, tmp_path / "out")
    assert read_json(tmp_path / "out" / "adapter_config.json")["modules_to_save"] == ["score"]
    again = recipe.Classifier(ml.load_model(tmp_path / "base"), LABELS, seed=7)  # its own head is replaced
    ml.load_adapter(again, tmp_path / "out")
    assert torch.equal(again(held_out), model(held_out))
    texts = ["the good cat", "bad sea", "so so town"]
    assert recipe.predict(again, tokenizer, texts) == recipe.predict(model, tokenizer, texts)


def test_control_tokens_of_a_text_are_plain_text(tokenizer):
    assert tokenizer().eos_id in tokenizer().encode("the <|end|>")
    assert tokenizer().eos_id not in recipe.encode("the <|end|>", tokenizer())


@pytest.mark.parity
@torch.no_grad()
def test_peft_and_we_read_each_other_s_adapter_and_head_to_the_same_scores(tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base, tokens = tmp_path / "base", token_ids(0, 1, 20)
    ml.save_model(tiny_model(dtype=torch.float32), base)
    ours, again = (recipe.Classifier(ml.load_model(base), LABELS) for _ in range(2))
    ml.attach(ours, ml.LoraConfig(**CONFIG))
    perturb_(ours)
    ml.save_adapter(ours, tmp_path / "ours")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=3)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "ours", is_trainable=True).eval()
    assert theirs.active_peft_config.task_type == "SEQ_CLS"
    assert_parity(ours([recipe.Row(tokens[0].tolist())]), theirs(input_ids=tokens).logits)
    perturb_(theirs, 1)
    theirs.save_pretrained(tmp_path / "theirs")
    ml.load_adapter(again, tmp_path / "theirs")
    assert_parity(again([recipe.Row(tokens[0].tolist())]), theirs(input_ids=tokens).logits)
