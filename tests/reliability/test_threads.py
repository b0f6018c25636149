"""Threads that use one model."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import minilora as ml
from tests.training import adapted

pytestmark = pytest.mark.reliability
PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6]]


def test_threads_that_generate_with_one_model_write_what_each_would_alone():
    shared = adapted(dtype=torch.float32, layers=2, lora_dropout=0.5)
    expected = [ml.generate(shared, [prompt], 24) for prompt in PROMPTS]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: ml.generate(shared, [PROMPTS[i % 2]], 24 - i % 3), range(60)))
    assert [text[0] for text in found] == [expected[i % 2][0][: 24 - i % 3] for i in range(60)]
    assert not shared.training
