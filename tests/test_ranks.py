"""A run on several ranks: losses, gradients, scores and files are those of one, but for the order of sums."""

import shutil
from dataclasses import replace

import pytest
import torch
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard

import minilora as ml
from minilora.adapter import adapter_layers
from minilora.errors import MiniloraError
from minilora.runs import sampler
from minilora.runs.evaluate import choice_accuracy, held_out_loss, measure_forgetting
from minilora.runs.sampler import plan_steps
from minilora.testing.compare import assert_parity
from tests.models import four_bit, long
from tests.ranks import on_ranks
from tests.training import adapted, gradients, random_rows, weights

ROWS = random_rows(0, 23)  # with 3 rows in a micro-batch and 3 of these in a step, the last step of an epoch is short
PLAN = {"batch_size": 3, "gradient_accumulation_steps": 2, "max_steps": 8, "save_steps": 2}
SAME = 1e-9  # relative, in float64: sums in another order
KINDS = {
    "lora": {"lora_dropout": 0.3},
    "dora": {"use_dora": True},
    "nf4": {"base": four_bit},
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["norm"], "is_fresh": True},
    "new tokens": {"trainable_token_indices": [1, 5], "is_fresh": True},
    "bias": {"bias": "lora_only", "family": "qwen2"},
}
counts = pytest.mark.parametrize("count", [2, *long(4)])


def learned(kind, **config):
    """The losses of the steps, the gradient of the first, and the weights after the last."""
    model, losses, first = adapted(layers=1, **KINDS[kind]), [], []

    def note(record):
        losses.append(record["loss"])
        if record["step"] == 1:
            first.append(gradients(model))

    parts = 1 if kind == "nf4" else 3  # of 1, a rank has nothing that counts
    steps = 8 if kind == "lora" else 3  # two epochs, or one, which ends in a short step
    plan = {"batch_size": 3, "gradient_accumulation_steps": parts, "max_grad_norm": 0, "max_steps": steps}
    result = ml.train(model, ROWS, ml.TrainConfig(**plan | config), note)
    return torch.tensor(losses, dtype=torch.float64), first[0], weights(model), result.tokens


def learned_all(config):
    return [learned(kind, **config) for kind in KINDS]


@counts
@pytest.mark.parametrize("config", [{}, *long({"batch_size": 2, "gradient_accumulation_steps": 5})], ids=str)
def test_ranks_learn_what_one_process_learns(count, config):
    alone, (first, *others) = learned_all(config), on_ranks(count, learned_all, config)
    for kind, one, several, *rest in zip(KINDS, alone, first, *others, strict=True):
        assert several[3] == one[3], kind
        for ours, theirs in zip(several[:3], one[:3], strict=True):
            assert_parity(ours, theirs, SAME)
        assert all(torch.equal(other[2], several[2]) for other in rest), kind


def scores():
    """All measures of an evaluation whose rows make several forward passes."""
    draw, answers = random_rows(1, 9), [(7,), (9, 3), (9, 4)]
    chosen = [ml.Example([i, i + 1, *a], [-100, -100, *a]) for i in range(7) for a in answers]
    model = adapted(layers=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler, "EVAL_TOKENS", 30)
        forgetting = measure_forgetting(model, draw)
        numbers = [held_out_loss(model, draw), choice_accuracy(model, chosen, answers)]
    return torch.tensor([*numbers, forgetting.before, forgetting.after, forgetting.kl], dtype=torch.float64)


def test_an_evaluation_is_shared_and_scores_all_rows():
    numbers = scores()
    for ours in on_ranks(2, scores):
        for one, several in zip(numbers, ours, strict=True):
            assert_parity(several, one, SAME)


def foreign(kind):
    """Train a model of one's own: replicated by nobody or by its owner's DDP, or divided by its owner's FSDP."""
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    model.load_state_dict({name: torch.linspace(-1, 1, p.numel()).view_as(p) for name, p in model.named_parameters()})
    if kind == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    if kind == "fsdp":
        for module in (model[0], model[2], model):
            fully_shard(module)

    def loss(model, rows):
        x = torch.stack(rows)
        return (model(x) - x[:, :3].sin()).square().sum(), len(rows), {"x": (x[:, 0].sum(), 2 * len(rows))}

    rows, records = list(torch.linspace(-2, 2, 66, dtype=torch.float64).view(11, 6)), []
    plan = {"batch_size": 2, "gradient_accumulation_steps": 3, "epochs": 2}  # one rank repeats a micro-batch
    config = ml.TrainConfig(**plan, learning_rate=0.02, max_grad_norm=0.5, weight_decay=0.1)
    ml.train(model, rows, config, records.append, loss=loss, held_out=rows)
    *steps, evaluation = records
    found = [[r["loss"], r["grad_norm"], r["x"]] for r in steps]
    return torch.tensor([*found, [evaluation["eval_loss"], 0, evaluation["eval_x"]]], dtype=torch.float64)


def foreign_all():
    with pytest.raises(ml.TrainingError, match="parameters are sharded"):
        foreign("fsdp")
    return [foreign(kind) for kind in ("plain", "ddp")]


def test_a_replicated_model_trains_through_loss_and_a_divided_one_is_refused():
    expected = foreign("plain")
    for found in on_ranks(2, foreign_all):
        for each in found:
            assert_parity(each, expected, SAME)


def averages(folder):
    """What a model with averages of its own holds after a run with checkpoints."""
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))
    rows = list(torch.linspace(-2, 2, 66).view(11, 6))
    loss = lambda model, rows: (model(torch.stack(rows)).square().sum(), len(rows))  # noqa: E731
    ml.train(model, rows, ml.TrainConfig(**PLAN), loss=loss, checkpoint_dir=folder)
    return model[1].running_mean.tolist()


def begun_apart(folder):
    """The averages of `averages`, and the adapter in a run whose second rank began with another one."""
    model = adapted(layers=1)
    factor = next(iter(adapter_layers(model).values())).adapters["default"].lora_A
    factor.data += distributed.get_rank()
    factors = []
    ml.train(model, ROWS, ml.TrainConfig(**PLAN), lambda record: factors.append(factor.tolist()))
    return factors, averages(folder)


def test_ranks_begin_with_the_adapter_of_the_first_one_and_end_with_its_averages(tmp_path):
    first, second = on_ranks(2, begun_apart, tmp_path)
    assert first == second


def misfortunes(folder):
    """What runs say in which one rank is not as the other, and where they stop."""
    messages = []

    def run(on_step, rows=ROWS, before=lambda model: None, folder=folder):
        model = adapted(layers=1)
        before(model)
        try:
            result = ml.train(model, rows, ml.TrainConfig(**PLAN), on_step, checkpoint_dir=folder)
            messages.append((result.steps, result.finished))
        except MiniloraError as error:
            messages.append(str(error))

    run(None, ROWS[distributed.get_rank() :])
    run(None, ROWS[:: 1 - 2 * distributed.get_rank()], folder=None)
    run(lambda record: distributed.get_rank() == 1 and record["step"] == 3)
    run(None)
    distributed.barrier()
    shutil.rmtree(folder, ignore_errors=True)
    distributed.barrier()
    rows = [replace(row, tokens=[token or 1 for token in row.tokens]) for row in ROWS]
    first = plan_steps(len(rows), ml.TrainConfig(**PLAN))[0][1][0]  # of rank 1
    rows[first] = replace(rows[first], tokens=[0, *rows[first].tokens[1:]])
    run(None, rows, lambda model: model.model.embed_tokens.weight.data[0].fill_(float("nan")))
    return messages


def test_a_rank_that_differs_or_stops_stops_all(tmp_path):
    first, second = on_ranks(2, misfortunes, tmp_path)
    assert first == second
    data, reversed_data, stopped, finished, bad = first
    assert "(dataset)" in data
    assert "step 1: loss nan" in bad
    assert data == reversed_data
    assert (stopped, finished) == ((3, False), (8, True))
