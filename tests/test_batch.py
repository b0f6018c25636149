from math import ceil

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

import minilora as ml
from minilora.data import IGNORE_INDEX, collate
from minilora.runs.sampler import plan_steps
from tests.models import examples as many
from tests.models import seeds

sizes = st.integers(1, 5)


@st.composite
def examples(draw):
    """One row of random tokens, each learned or not."""
    pairs = draw(st.lists(st.tuples(st.integers(0, 60), st.booleans()), min_size=1, max_size=6))
    return ml.Example([token for token, _ in pairs], [token if here else IGNORE_INDEX for token, here in pairs])


def micro_batches(count, **config):
    return [rows for step in plan_steps(count, ml.TrainConfig(**config)) for rows in step]


def plan_by_rows(count, config):
    """The plan of a run, row by row.

    A fraction of an epoch is that fraction of its steps; `max_steps` counts, whatever the epochs.
    """
    steps, epochs = [], config.epochs if config.max_steps is None else config.max_steps
    for epoch in range(ceil(epochs)):
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + epoch)
        order, found = torch.randperm(count, generator=generator).tolist(), []
        for row in order:
            is_full = not found or len(found[-1]) == config.batch_size
            found = [*found, [row]] if is_full else [*found[:-1], [*found[-1], row]]
        size = config.gradient_accumulation_steps
        whole = [found[i : i + size] for i in range(0, len(found), size)]
        steps += whole[: ceil(round(min(1.0, epochs - epoch) * len(whole), 9))]
    return steps[: config.max_steps]


@many(3)
@given(
    st.integers(1, 12),
    st.fixed_dictionaries({"batch_size": sizes, "gradient_accumulation_steps": sizes, "seed": seeds}),
    st.integers(1, 35).map(lambda tenths: {"epochs": tenths / 10})
    | st.fixed_dictionaries({"max_steps": st.integers(1, 9), "epochs": st.sampled_from([0.3, 7.5])}),
)
@example(9, {"batch_size": 2, "gradient_accumulation_steps": 2, "seed": 5}, {"epochs": 2.5})
@example(9, {"batch_size": 2, "gradient_accumulation_steps": 2, "seed": 5}, {"max_steps": 9})
@example(10, {"batch_size": 1}, {"epochs": 1.1})  # 1.1 - 1 is more than a tenth
def test_the_plan_is_that_of_its_definition(count, batches, length):
    config = ml.TrainConfig(**batches, **length)
    assert plan_steps(count, config) == plan_by_rows(count, config)


@pytest.mark.parametrize("epochs", [1e-10, 5e-324])
def test_a_run_has_at_least_one_step(epochs):
    assert len(plan_steps(4, ml.TrainConfig(epochs=epochs))) == 1


@given(seeds)
def test_another_seed_and_another_epoch_have_another_order(seed):
    orders = [[row for rows in micro_batches(30, epochs=3, seed=each) for row in rows] for each in (seed, seed + 1)]
    assert len({tuple(order[i : i + 30]) for order in orders for i in (0, 30, 60)}) == 6


@pytest.mark.parametrize(
    "changes", [{"max_steps": 10**6 + 1}, {"max_steps": 10**30}, {"epochs": 3e5}, {"epochs": 1e300}]
)
def test_more_steps_than_a_plan_can_hold_are_refused_at_once(changes):
    with pytest.raises(ml.ConfigError, match=r"max_steps .*, epochs .*: need at most 1,000,000 steps"):
        plan_steps(20, ml.TrainConfig(**changes))


@given(st.lists(examples(), min_size=1, max_size=5))
def test_a_batch_is_rows_end_to_end_and_no_target_crosses_from_one_to_the_next(rows):
    """A token predicts the one after it."""
    batch = collate(rows, torch.device("cpu"))
    targets = []
    position = 0
    for row, length in zip(rows, batch.lengths, strict=True):
        for i in range(length):
            assert batch.tokens[position] == row.tokens[i]
            targets.append(row.labels[i + 1] if i + 1 < length else IGNORE_INDEX)
            position += 1
    assert position == len(batch.tokens) == len(targets)
    assert batch.label_positions.tolist() == [i for i, target in enumerate(targets) if target != IGNORE_INDEX]
    assert batch.labels.tolist() == [target for target in targets if target != IGNORE_INDEX]
    assert len(batch.labels) == sum(row.labelled for row in rows)
