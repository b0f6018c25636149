"""Rows of tokens, tiny models with an adapter, and their loss and gradients the plain way."""

import random
import shutil

import torch

import minilora as ml
from minilora.data import IGNORE_INDEX
from minilora.files import MANIFEST, manifest_of, write_json
from minilora.runs.checkpoints import newest_checkpoint, step_of
from minilora.testing.compare import MATHS, relative
from tests.models import randomize_adapters_, tiny_model


def random_rows(seed, count, vocabulary=61):
    """Rows of random tokens whose answers are of very different lengths, some tokens in between not learned."""
    draw = random.Random(seed)
    rows = []
    for i in range(count):
        prompt, answer = draw.randint(1, 5), draw.choice([1, 2, 9])
        tokens = [draw.randrange(vocabulary) for _ in range(prompt + answer)]
        is_learned = [False] * prompt + [draw.random() < 0.8 for _ in range(answer - 1)] + [True]
        labels = [t if here else IGNORE_INDEX for t, here in zip(tokens, is_learned, strict=True)]
        rows.append(ml.Example(tokens, labels, f"rows.jsonl:{i + 1}"))
    return rows


def adapted(family="llama", dtype=torch.float64, seed=0, is_fresh=False, name="default", base=None, layers=4, **config):
    """A tiny model with an adapter in the same dtype; `base` makes another of it first."""
    model = tiny_model(family, dtype=dtype, num_hidden_layers=layers)
    model = base(model) if base else model
    ml.attach(model, ml.LoraConfig(**{"r": 3, "lora_alpha": 6, **config}), name=name, seed=seed, dtype=dtype)
    if not is_fresh:
        randomize_adapters_(model, seed)
    return model


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gradients(model):
    return torch.cat([p.grad.flatten() for p in trained(model).values()])


def weights(model):
    return torch.cat([p.detach().flatten() for p in trained(model).values()])


def gradient_of(loss, model):
    parts = torch.autograd.grad(loss, [*trained(model).values()], allow_unused=True, materialize_grads=True)
    return torch.cat([part.flatten() for part in parts])


def number(value):
    return torch.tensor(value, dtype=torch.float64)


def log_probs(model, row):
    """log p of each label of a row, from full logits."""
    logs = model(torch.tensor([row.tokens]))[0].log_softmax(-1)
    return torch.stack([logs[i - 1, label] for i, label in enumerate(row.labels) if i and label != IGNORE_INDEX])


def plain_loss(model, rows):
    """The mean over all labelled tokens of all rows of -log p."""
    return -torch.cat([log_probs(model, row) for row in rows]).mean()


def plain_gradients(model, rows):
    model.zero_grad()
    plain_loss(model, rows).backward()
    return gradients(model)


def one_step(model, rows, **config):
    """Run one step over all rows; its record, and the gradients that AdamW was given."""
    found = []
    config = ml.TrainConfig(**{"max_steps": 1, "max_grad_norm": 0, **config})
    ml.train(model, rows, config, lambda record: found.extend((record, gradients(model))))
    record, given = found
    return record, given


def assert_same_gradient(actual, expected):
    """Of two cuttings of a step, in float64: ten times closer than `assert_maths` asks."""
    assert (used := relative(actual, expected, MATHS / 10)) <= 1, f"{used:.3g} times the allowed error"


def stop_after(step):
    return lambda record: record["step"] == step


CHECKPOINT = ("adapter_config.json", "adapter_model.safetensors", "trained.safetensors", "optimizer.safetensors")


def contents(directory, step=6):
    """The bytes of a checkpoint, but for those that say how long it took."""
    checkpoint = directory / f"step-{step:06d}"
    return {name: (checkpoint / name).read_bytes() for name in CHECKPOINT if (checkpoint / name).is_file()}


def as_written(directory):
    """Let the manifest of a directory say what is in it now, as if it had been written so."""
    (directory / MANIFEST).unlink()
    write_json(directory / MANIFEST, manifest_of(directory))


def newest_step(directory):
    return step_of(newest_checkpoint(directory)[0])


def copy_checkpoint(run, step, directory):
    """Copy one checkpoint of a run into another directory, as if the run had been killed there; where it lies."""
    name = f"step-{step:06d}"
    return shutil.copytree(run / name, directory / name)


def assert_resumed_to_the_same_bytes(directory, make, rows, **arguments):
    """A run of a loss that was stopped after two steps ends as one that was not; the records of that one, by kind."""
    config = ml.TrainConfig(batch_size=2, max_steps=4, save_steps=1, learning_rate=0.01, eval_steps=4)
    whole, records = make(), []
    ml.train(whole, rows, config, records.append, rows[:2], **arguments)
    for step in (2, 0):
        model = make()
        ml.train(model, rows, config, stop_after(step), rows[:2], directory, **arguments)
    assert torch.equal(weights(model), weights(whole))
    assert not torch.equal(weights(make()), weights(whole))
    return [record for record in records if "loss" in record], records[-1]
