"""A penalty on the divergence from the base: token by token, nothing at the start, less forgetting after training."""

from functools import partial

import torch
from hypothesis import given

import minilora as ml
from minilora.data import IGNORE_INDEX, collate
from minilora.runs.evaluate import measure_forgetting
from minilora.testing.compare import assert_maths
from minilora.training import token_loss
from recipes.kl_penalty import kl_to_base, penalized_loss
from tests.models import examples, seeds, tiny_model
from tests.training import adapted, gradient_of, random_rows


@examples(0.2)
@given(seeds)
def test_the_penalty_and_its_gradient_are_those_of_the_equation(seed):
    model, rows = adapted(layers=2, seed=seed), random_rows(seed, 3)
    expected, n = 0, 0
    for row in rows:
        q = model(torch.tensor([row.tokens]))[0].softmax(-1)
        with ml.disable_adapter(model):
            p = model(torch.tensor([row.tokens]))[0].softmax(-1).detach()
        for i, label in enumerate(row.labels):
            if i and label != IGNORE_INDEX:
                expected += (p[i - 1] * (p[i - 1] / q[i - 1]).log()).sum()
                n += 1
    total, count = kl_to_base(model, rows)
    assert count == n
    assert_maths(total, expected)
    assert_maths(gradient_of(total, model), gradient_of(expected, model))


def test_a_new_adapter_has_the_loss_of_the_task():
    model, rows = tiny_model(), random_rows(0, 3)
    ml.attach(model, ml.LoraConfig())
    total, count, metrics = penalized_loss(model, rows, general=random_rows(1, 5))
    expected, labels = token_loss(model, collate(rows, torch.device("cpu")))
    assert count == labels
    assert_maths(total, expected)
    assert metrics["kl"][0].item() == 0


def test_a_model_forgets_less_with_the_penalty():
    rows, general = random_rows(0, 8), random_rows(1, 4)
    after = {}
    for beta in (0.0, 1.0):
        model = tiny_model(num_hidden_layers=1, dtype=torch.float32)
        ml.attach(model, ml.LoraConfig())
        config = ml.TrainConfig(learning_rate=0.01, batch_size=8, max_steps=30, epochs=30)
        ml.train(model, rows, config, loss=partial(penalized_loss, general=general, beta=beta, share=0.5))
        after[beta] = measure_forgetting(model, general).kl
    assert after[1.0] < after[0.0] / 2
