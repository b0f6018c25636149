"""A T5 of transformers learns through our loop to write backwards; a BERT in tests/recipes/test_classify_tokens.py."""

import random

import pytest
import torch
from torch.nn import functional as F

import minilora as ml

pytestmark = pytest.mark.parity
transformers = pytest.importorskip("transformers")

PAD, START = 0, 1  # ids of no letter


def padded(rows):
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=PAD)


def strings(seed, count, letters=6):
    draw = random.Random(seed)
    return [[draw.randrange(2, 2 + letters) for _ in range(draw.randint(1, 3))] for _ in range(count)]


def reversed_(model, rows):
    """Each row is to be written backwards, and then an end; T5 takes what is written so far one place to the right."""
    ids = padded(rows)
    wanted = padded([[*reversed(row), START] for row in rows])
    logits = model(input_ids=ids, attention_mask=(ids != PAD).long(), labels=wanted).logits
    total = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=PAD, reduction="sum")
    return total, wanted.ne(PAD).sum()


def test_a_t5_learns_what_it_has_not_seen():
    torch.manual_seed(0)
    sizes = {"vocab_size": 10, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    config = transformers.T5Config(**sizes, pad_token_id=PAD, eos_token_id=START, decoder_start_token_id=PAD)
    model, held_out, losses = transformers.T5ForConditionalGeneration(config), strings(2, 100), []
    with torch.no_grad():
        total, count = reversed_(model.eval(), held_out)
    config = ml.TrainConfig(learning_rate=0.005, epochs=4, batch_size=16, lr_scheduler="linear", eval_steps=20)
    result = ml.train(
        model, strings(1, 400), config, lambda r: losses.append(r.get("eval_loss")), held_out, loss=reversed_
    )
    assert losses[-1] < 0.5 * (total / count).item()
    assert result.finished
