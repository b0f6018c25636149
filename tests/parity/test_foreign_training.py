"""Models of transformers learn through our loop: a BERT classifies, a T5 writes backwards."""

import random

import pytest
import torch
from torch.nn import functional as F

import minilora as ml
from minilora.testing.compare import assert_parity

pytestmark = pytest.mark.parity
transformers = pytest.importorskip("transformers")

PAD, START = 0, 1  # ids of no word
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def padded(rows):
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=PAD)


def sentences(seed, count, vocabulary=24):
    """Random words; the class is which half of the vocabulary the most of them are from."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        label, length = draw.randrange(2), draw.randint(4, 9)
        words = [draw.randrange(2, 13) + 11 * (label if draw.random() < 0.8 else 1 - label) for _ in range(length)]
        rows.append({"tokens": [START, *words], "label": sum(word >= 13 for word in words) * 2 > length})
    return rows


def bert():
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=24, num_labels=2, max_position_embeddings=16, **SIZES)
    model = transformers.BertForSequenceClassification(config)
    ml.attach(model, ml.LoraConfig(r=4, target_modules=("query", "value"), task_type="SEQ_CLS"))  # and the classifier
    return model


def classified(model, rows):
    ids = padded([row["tokens"] for row in rows])
    logits = model(input_ids=ids, attention_mask=(ids != PAD).long()).logits
    return F.cross_entropy(logits, torch.tensor([int(row["label"]) for row in rows]), reduction="sum"), len(rows)


def strings(seed, count, letters=6):
    draw = random.Random(seed)
    return [[draw.randrange(2, 2 + letters) for _ in range(draw.randint(1, 3))] for _ in range(count)]


def t5():
    torch.manual_seed(0)
    sizes = {"vocab_size": 10, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    config = transformers.T5Config(**sizes, pad_token_id=PAD, eos_token_id=START, decoder_start_token_id=PAD)
    return transformers.T5ForConditionalGeneration(config)


def reversed_(model, rows):
    """Each row is to be written backwards, and then an end; T5 takes what is written so far one place to the right."""
    ids = padded(rows)
    wanted = padded([[*reversed(row), START] for row in rows])
    logits = model(input_ids=ids, attention_mask=(ids != PAD).long(), labels=wanted).logits
    total = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=PAD, reduction="sum")
    return total, wanted.ne(PAD).sum()


TASKS = {
    "bert": (bert, classified, sentences, {"learning_rate": 0.01, "epochs": 3, "batch_size": 8}),
    "t5": (t5, reversed_, strings, {"learning_rate": 0.005, "epochs": 4, "batch_size": 16}),
}


def run(task, directory=None, **config):
    build, loss, rows, defaults = TASKS[task]
    model, losses = build(), []
    config = ml.TrainConfig(**{**defaults, "lr_scheduler": "linear", "save_total_limit": 9, "eval_steps": 20, **config})

    def watch(record):
        losses.extend([record["eval_loss"]] if "eval_loss" in record else [])

    result = ml.train(model, rows(1, 400), config, watch, rows(2, 100), directory, loss)
    return model, losses, result


@pytest.mark.parametrize("task", TASKS)
def test_it_learns_what_it_has_not_seen(task):
    build, loss, rows, _ = TASKS[task]
    with torch.no_grad():
        total, count = loss(build().eval(), rows(2, 100))
    _, losses, result = run(task)
    assert losses[-1] < 0.5 * (total / count).item()
    assert result.finished


def test_the_adapter_of_a_checkpoint_is_one_that_peft_reads(tmp_path):
    peft = pytest.importorskip("peft")
    model, _, _ = run("bert", tmp_path, max_steps=4)
    torch.manual_seed(0)
    base = transformers.BertForSequenceClassification(model.config)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "step-000004").eval()
    ids = padded([row["tokens"] for row in sentences(3, 5)])
    mask = (ids != PAD).long()
    with torch.no_grad():
        ours, others = (each(input_ids=ids, attention_mask=mask).logits for each in (model, theirs))
    assert_parity(ours, others)
