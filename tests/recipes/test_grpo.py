"""GRPO: what is drawn, the equation token by token, that a reward rises, and TRL's loss and gradient."""

import copy
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import minilora as ml
from minilora.data import IGNORE_INDEX
from minilora.testing.compare import assert_maths, assert_parity
from recipes.grpo import Sample, clipped_loss, draw, grpo_loss
from tests.models import examples, perturb_, seeds, tiny_model
from tests.text import write_tokenizer
from tests.training import adapted, gradient_of, log_probs, number

STOPS = {3, 50}
TOKENIZER = SimpleNamespace(stop_ids=STOPS, decode=lambda tokens: " ".join(map(str, tokens)))
ROWS = [{"prompt": [1, 2, 9], "answer": "7"}, {"prompt": [5], "answer": "8"}, {"prompt": [2, 2], "answer": "7"}]


def share(row, text):
    """The share of tokens that are above 30."""
    tokens = text.split()
    return sum(int(token) > 30 for token in tokens) / max(1, len(tokens))


@examples(0.2)
@given(seeds, st.integers(2, 4))
def test_samples_are_what_was_drawn_with_log_pi_and_the_place_of_their_reward_in_the_group(seed, group):
    model = adapted(layers=2, seed=seed)
    torch.manual_seed(seed)
    samples = draw(model, ROWS, TOKENIZER, share, group, max_new_tokens=5)
    assert len(samples) == group * len(ROWS)
    for i, sample in enumerate(samples):
        prompt, (tokens, labels) = ROWS[i // group]["prompt"], (sample.example.tokens, sample.example.labels)
        assert tokens[: len(prompt)] == prompt
        drawn = tokens[len(prompt) :]
        assert labels == [IGNORE_INDEX] * len(prompt) + drawn
        assert drawn[-1] in STOPS or len(drawn) == 5
        assert not STOPS & {*drawn[:-1]}
        text = TOKENIZER.decode([token for token in drawn if token not in STOPS])
        assert sample.reward == share(ROWS[i // group], text)
        assert_maths(torch.tensor(sample.log_probs, dtype=torch.float64), log_probs(model, sample.example))
    rewards = np.array([sample.reward for sample in samples]).reshape(-1, group)
    expected = (rewards - rewards.mean(1, keepdims=True)) / (rewards.std(1, ddof=1, keepdims=True) + 1e-4)
    assert_maths(number([sample.advantage for sample in samples]), torch.tensor(expected.reshape(-1)))


def test_a_group_of_one_is_refused():
    with pytest.raises(ml.ConfigError, match="group is 1"):
        draw(adapted(layers=1), ROWS, TOKENIZER, share, group=1)


def drawn_earlier(seed, count=5):
    """Samples of a model that has changed since."""
    generator = np.random.default_rng(seed)
    samples = []
    for i in range(count):
        prompt, drawn = (generator.integers(1, 60, generator.integers(1, 6)).tolist() for _ in range(2))
        old = generator.uniform(-6, -2, len(drawn)).tolist()
        example = ml.Example(prompt + drawn, [IGNORE_INDEX] * len(prompt) + drawn)
        samples.append(Sample(example, old, generator.uniform(), generator.normal() if i else 0.0))
    return samples


@examples(0.2)
@given(seeds, st.sampled_from([0.05, 0.2]), st.sampled_from([0.0, 0.04, 2.0]))
def test_the_loss_and_its_gradient_are_those_of_the_equation(seed, clip, beta):
    model, samples = adapted(layers=2, seed=seed), drawn_earlier(seed)
    base = copy.deepcopy(model)
    ml.detach(base)
    expected, kl, clipped = [], [], 0
    for sample in samples:
        parts = []
        new_and_reference = log_probs(model, sample.example), log_probs(base, sample.example)
        for new, reference, old in zip(*new_and_reference, sample.log_probs, strict=True):
            ratio, delta = (new - old).exp(), reference - new
            bounded = min(max(ratio, 1 - clip), 1 + clip)
            kl.append(delta.exp() - delta - 1)
            parts.append(beta * kl[-1] - min(ratio * sample.advantage, bounded * sample.advantage))
            clipped += not 1 - clip <= ratio <= 1 + clip
        expected.append(sum(parts) / len(parts))
    total, count, metrics = clipped_loss(model, samples, clip, beta)
    assert count == len(samples)
    assert_maths(total, sum(expected))
    assert_maths(gradient_of(total, model), gradient_of(sum(expected), model))
    assert_maths(metrics["kl"][0], sum(kl))
    assert metrics["clipped"] == (clipped, len(kl))
    assert metrics["length"] == (len(kl), count)
    assert metrics["no_advantage"] == (1, count)


def test_a_reward_rises():
    loss = partial(grpo_loss, tokenizer=TOKENIZER, reward=share, max_new_tokens=5)
    records, config = [], ml.TrainConfig(learning_rate=0.02, batch_size=3, max_steps=20, lr_scheduler="constant")
    ml.train(adapted(layers=1, dtype=torch.float32, is_fresh=True), ROWS, config, records.append, loss=loss)
    rewards = [record["reward"] for record in records]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.2
    assert records[0]["kl"] == 0 < records[-1]["kl"]


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")
def test_trl_has_the_same_loss_and_gradient_on_the_same_samples(tmp_path):
    trl, peft = pytest.importorskip("trl"), pytest.importorskip("peft")
    from datasets import Dataset
    from transformers import AutoTokenizer

    from tests.parity.theirs import theirs_loaded, with_factors_of

    names = ["q_proj", "down_proj"]
    ours = tiny_model(dtype=torch.float32, vocab_size=400, num_hidden_layers=2)
    ml.save_model(ours, tmp_path, write_tokenizer(tmp_path))
    ml.attach(ours, ml.LoraConfig(r=3, lora_alpha=21, target_modules=names))
    args = trl.GRPOConfig(
        output_dir=str(tmp_path / "trl"), loss_type="grpo", beta=0.3, use_bias_correction_kl=False, epsilon=0.2,
        bf16=False, report_to="none", use_cpu=True, per_device_train_batch_size=2, num_generations=2,
        gradient_checkpointing=False,
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        theirs_loaded(tmp_path),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=args,
        train_dataset=Dataset.from_list([{"prompt": "the cat"}] * 2),
        processing_class=AutoTokenizer.from_pretrained(tmp_path),
        peft_config=peft.LoraConfig(r=3, lora_alpha=21, target_modules=names),
    )
    perturb_(ours)
    pairs, samples = with_factors_of(ours, trainer.model), drawn_earlier(1)
    base = copy.deepcopy(ours)
    ml.detach(base)
    inputs = {"advantages": torch.tensor([sample.advantage for sample in samples])}
    inputs |= padded_prompts([sample.example for sample in samples])
    for name, each in (
        ("old_per_token_logps", [torch.tensor(sample.log_probs) for sample in samples]),
        ("ref_per_token_logps", [log_probs(base, sample.example).detach() for sample in samples]),
    ):
        inputs[name] = torch.nn.utils.rnn.pad_sequence(each, batch_first=True)
    trainer.model.eval()
    theirs = trainer._compute_loss(trainer.model, inputs)
    theirs.backward()
    total, count, _ = clipped_loss(ours, samples, clip=0.2, beta=0.3)
    (total / count).backward()
    assert_parity(total / count, theirs)
    for mine, other in pairs:
        assert mine.grad.any()
        assert_parity(mine.grad, other.grad)


def padded_prompts(rows):
    """Prompts, padded on the left, and answers, padded on the right, with their masks."""
    begins = [sum(label == IGNORE_INDEX for label in row.labels) for row in rows]
    longest = max(begins)
    prompts = torch.tensor([[0] * (longest - b) + row.tokens[:b] for b, row in zip(begins, rows, strict=True)])
    mask = torch.tensor([[0] * (longest - b) + [1] * b for b in begins])
    answers = [torch.tensor(row.tokens[b:]) for b, row in zip(begins, rows, strict=True)]
    padded = torch.nn.utils.rnn.pad_sequence(answers, batch_first=True)
    ones = torch.nn.utils.rnn.pad_sequence([torch.ones_like(answer) for answer in answers], batch_first=True)
    return {"prompt_ids": prompts, "prompt_mask": mask, "completion_ids": padded, "completion_mask": ones}
