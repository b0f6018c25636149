"""DPO: the equation pair by pair, what is reported, and TRL's loss and gradient."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import minilora as ml
from minilora.data import collate
from minilora.testing.compare import assert_maths, assert_parity
from recipes.dpo import dpo_loss, load_pairs
from tests.models import examples, perturb_, seeds, tiny_model
from tests.text import write_tokenizer
from tests.training import adapted, assert_resumed_to_the_same_bytes, gradient_of, log_probs, number, random_rows

NAMES = ["q_proj", "down_proj"]
TEXTS = [
    {"prompt": "what is the town?", "chosen": " the cat", "rejected": " it sat on the mat"},
    {"prompt": "the land", "chosen": " is by the sea, the answer", "rejected": " ate"},
    {"prompt": "naïve café", "chosen": " the end", "rejected": " the dog"},
]


def pairs_of(seed, count):
    rows = random_rows(seed, 2 * count)
    return list(zip(rows[::2], rows[1::2], strict=True))


def log_prob(model, row):
    return log_probs(model, row).sum()


def written_out(model, pairs, beta):
    """-log σ(β M) of each pair, and its margin."""
    base = copy.deepcopy(model)
    ml.detach(base)
    margins = [
        beta * sum(sign * (log_prob(model, row) - log_prob(base, row)) for sign, row in zip((1, -1), pair, strict=True))
        for pair in pairs
    ]
    return [(1 + (-margin).exp()).log() for margin in margins], margins


@examples(0.2)
@given(seeds, st.integers(1, 4), st.sampled_from([0.1, 3.0]))
def test_the_loss_and_its_gradient_are_those_of_the_equation(seed, count, beta):
    model, pairs = adapted(layers=2, seed=seed), pairs_of(seed, count)
    losses, margins = written_out(model, pairs, beta)
    total, number_of_pairs, metrics = dpo_loss(model, pairs, beta)
    assert number_of_pairs == count
    assert_maths(total, sum(losses))
    assert_maths(gradient_of(total, model), gradient_of(sum(losses), model))
    means = {name: each[0] / each[1] for name, each in metrics.items()}
    assert_maths(means["rewards/margins"], sum(margins) / count)
    assert_maths(means["rewards/chosen"] - means["rewards/rejected"], sum(margins) / count)
    assert means["rewards/accuracies"] == sum(margin > 0 for margin in margins) / count
    assert_maths(means["logps/chosen"], sum(log_prob(model, chosen) for chosen, _ in pairs) / count)
    assert_maths(means["logps/rejected"], sum(log_prob(model, rejected) for _, rejected in pairs) / count)


def test_a_new_adapter_has_the_loss_log_2_and_training_makes_margins_grow_also_when_resumed(tmp_path):
    make = lambda: adapted(layers=1, dtype=torch.float32, is_fresh=True)  # noqa: E731
    steps, evaluation = assert_resumed_to_the_same_bytes(tmp_path, make, pairs_of(0, 2), loss=dpo_loss)
    assert_maths(number(steps[0]["loss"]), torch.tensor(2.0).log())
    margins = [record["rewards/margins"] for record in steps]
    assert margins[0] == 0 < margins[1] < margins[-1] < evaluation["eval_rewards/margins"]
    assert evaluation["eval_rewards/accuracies"] == 1


def test_the_chapter_on_preferences_has_the_same_loss():
    page = (Path(__file__).parents[2] / "tutorials" / "A1_preferences.md").read_text(encoding="utf-8")
    names = {"torch": torch, "F": torch.nn.functional}
    exec(re.search(r"```python\n(from minilora import adapter, data\n.*?)```", page, re.DOTALL)[1], names)
    model, pairs = adapted(layers=2), pairs_of(0, 3)
    batch = collate([row for pair in pairs for row in pair], torch.device("cpu"))
    assert_maths(names["dpo_loss"](model, batch, 0.3)[0], dpo_loss(model, pairs, 0.3)[0])


def write_pairs(directory, rows=TEXTS):
    (directory / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory / "pairs.jsonl"


def test_pairs_have_one_prompt_and_those_that_are_cut_are_left_out(tmp_path):
    tokenizer = write_tokenizer(tmp_path)
    path = write_pairs(tmp_path, [*TEXTS, {"prompt": "the", "chosen": " cat", "rejected": " dog" * 99}])
    pairs = load_pairs(path, tokenizer, ml.DataConfig(max_length=60))
    texts = [[tokenizer.decode(row.tokens) for row in pair] for pair in pairs]
    assert texts == [[row["prompt"] + row["chosen"], row["prompt"] + row["rejected"]] for row in TEXTS]
    assert all(row.labels[-1] == tokenizer.eos_id for pair in pairs for row in pair)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_trl_has_the_same_loss_gradient_and_metrics(tmp_path):
    trl, peft = pytest.importorskip("trl"), pytest.importorskip("peft")
    from datasets import Dataset
    from transformers import AutoTokenizer

    from tests.parity.theirs import theirs_loaded, with_factors_of

    tokenizer = write_tokenizer(tmp_path)
    ours = tiny_model(dtype=torch.float32, vocab_size=400, num_hidden_layers=2)
    ml.save_model(ours, tmp_path, tokenizer)
    ml.attach(ours, ml.LoraConfig(r=3, lora_alpha=21, target_modules=NAMES))
    args = trl.DPOConfig(
        output_dir=str(tmp_path / "trl"), per_device_train_batch_size=3, beta=0.3, bf16=False, report_to="none",
        use_cpu=True, gradient_checkpointing=False,
    )  # fmt: skip
    trainer = trl.DPOTrainer(
        theirs_loaded(tmp_path),
        args=args,
        train_dataset=Dataset.from_list(TEXTS),
        processing_class=AutoTokenizer.from_pretrained(tmp_path),
        peft_config=peft.LoraConfig(r=3, lora_alpha=21, target_modules=NAMES),
    )
    perturb_(ours)
    pairs = with_factors_of(ours, trainer.model)
    theirs = trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
    theirs.backward()
    total, count, metrics = dpo_loss(ours, load_pairs(write_pairs(tmp_path), tokenizer), beta=0.3)
    (total / count).backward()
    assert_parity(total / count, theirs)
    for mine, other in pairs:
        assert mine.grad.any()
        assert_parity(mine.grad, other.grad)
    logged = trainer._metrics["train"]
    for name, (value, number_of_pairs) in metrics.items():
        assert_parity(value / number_of_pairs, torch.tensor(logged[name][-1]))
