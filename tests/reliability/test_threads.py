"""Threads that use one model."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import minilora as ml
from tests.training import adapted, random_rows

pytestmark = pytest.mark.reliability
PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6]]


def model():
    return adapted(dtype=torch.float32, layers=2, lora_dropout=0.5).train()


def test_threads_that_generate_with_one_model_write_what_each_would_alone():
    """The model is in train mode: with dropout the texts would be others."""
    shared = model()
    expected = [ml.generate(shared, [prompt], 24) for prompt in PROMPTS]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: ml.generate(shared, [PROMPTS[i % 2]], 24 - i % 3), range(60)))
    assert [text[0] for text in found] == [expected[i % 2][0][: 24 - i % 3] for i in range(60)]
    assert shared.training


def test_while_one_thread_trains_a_model_another_can_neither_generate_with_it_nor_train_it():
    shared, others = model(), []

    def interfere():
        for call in (lambda: ml.generate(shared, PROMPTS, 2), lambda: ml.train(shared, random_rows(1, 4))):
            with pytest.raises(ml.TrainingError, match="another thread trains") as error:
                call()
            others.append(error)

    def on_step(record):
        thread = threading.Thread(target=interfere)
        thread.start()
        thread.join()
        assert ml.generate(shared, PROMPTS, 2)  # the thread that trains may

    trained = ml.train(shared, random_rows(1, 4), ml.TrainConfig(max_steps=2), on_step)
    assert trained.steps == 2
    assert len(others) == 4
    assert ml.generate(shared, PROMPTS, 2)
