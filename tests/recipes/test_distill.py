"""On-policy distillation: the divergence token by token, samples of the student, and TRL's loss."""

from functools import partial

import pytest
import torch
from hypothesis import given

import minilora as ml
from minilora.data import IGNORE_INDEX, collate
from minilora.testing.compare import assert_maths
from recipes.distill import distillation_loss, draw, log_distributions, reverse_kl
from tests.models import examples, seeds, tiny_model
from tests.training import adapted, gradient_of, random_rows

CPU = torch.device("cpu")
PROMPTS = [[1, 2, 9], [5], [2, 2]]
STOPS = {3, 50}


@examples(0.2)
@given(seeds)
def test_the_loss_and_its_gradient_are_those_of_the_equation(seed):
    student, teacher, rows = adapted(layers=2, seed=seed), tiny_model(seed=seed + 1), random_rows(seed, 3)
    expected, same, n = 0, 0, 0
    for row in rows:
        p, q = (model(torch.tensor([row.tokens]))[0].softmax(-1) for model in (student, teacher))
        for i, label in enumerate(row.labels):
            if i and label != IGNORE_INDEX:
                expected += (p[i - 1] * (p[i - 1] / q[i - 1].detach()).log()).sum()
                same += int(p[i - 1].argmax() == q[i - 1].argmax())
                n += 1
    total, count, metrics = reverse_kl(student, teacher, rows)
    assert (count, metrics["agreement"], metrics["length"]) == (n, (same, n), (n, 3))
    assert_maths(total, expected)
    assert_maths(gradient_of(total, student), gradient_of(expected, student))


def test_a_student_answers_itself_up_to_a_stop_token_which_it_learns_as_well():
    model = tiny_model()
    torch.manual_seed(0)
    rows = draw(model, PROMPTS * 9, 5, STOPS)
    torch.manual_seed(0)
    answers = ml.generate(model, PROMPTS * 9, 5, temperature=1.0, stop_ids=STOPS)
    for row, prompt, answer in zip(rows, PROMPTS * 9, answers, strict=True):
        drawn = row.tokens[len(prompt) :]
        assert row.labels == [IGNORE_INDEX] * len(prompt) + drawn
        assert drawn == ([*answer, answer.stop] if len(answer) < 5 else answer)
    assert any(answer.stop for answer in answers)


def test_a_student_comes_nearer_to_its_teacher():
    teacher = tiny_model(seed=1, num_hidden_layers=1, dtype=torch.float32)
    loss = partial(distillation_loss, teacher=teacher, stop_ids=STOPS, max_new_tokens=5)
    records, config = [], ml.TrainConfig(learning_rate=0.02, batch_size=3, max_steps=30, lr_scheduler="constant")
    ml.train(adapted(layers=1, dtype=torch.float32), PROMPTS, config, records.append, loss=loss)
    assert records[-1]["loss"] < 0.7 * records[0]["loss"]
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_trl_has_the_same_divergence():
    gkd = pytest.importorskip("trl.experimental.gkd")
    student, teacher, rows = adapted(layers=2), tiny_model(seed=1), random_rows(0, 3)
    batch = collate(rows, CPU)
    logits = [log_distributions(model, batch).unsqueeze(0) for model in (student, teacher)]
    theirs = gkd.GKDTrainer.generalized_jsd_loss(*logits, batch.labels.unsqueeze(0), beta=1, reduction="sum")
    assert_maths(reverse_kl(student, teacher, rows)[0], theirs)
