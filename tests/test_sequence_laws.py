"""The laws of documents in one batch and of generation with a cache: the right pass, planted mistakes are refused."""

from itertools import chain

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import minilora as ml
from minilora.llama import Documents
from minilora.testing import CheckFailure, check, check_generation, check_packing, laws
from tests.models import tiny_model

VOCABULARY, WIDTH = 23, 8


class Tiny(nn.Module):
    """One layer of attention, in float64; `faults` are mistakes to make."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding, self.q, self.k, self.v = (
            nn.Parameter(torch.randn(rows, WIDTH, dtype=torch.float64, generator=generator))
            for rows in (VOCABULARY, WIDTH, WIDTH, WIDTH)
        )

    def logits(self, documents, *faults):
        lengths = torch.tensor([len(document) for document in documents])
        row = torch.arange(len(documents)).repeat_interleave(lengths)
        position = torch.cat([torch.arange(n) for n in lengths])
        if "positions go on" in faults:
            position = torch.arange(len(row))
        x = self.embedding[torch.tensor([*chain(*documents)])] + torch.sin(
            position[:, None] * torch.arange(1, WIDTH + 1)
        )
        sees = torch.ones(len(row), len(row)).tril().bool()
        if "attention looks across" not in faults:
            sees &= row[:, None] == row
        if "the first token of a neighbour is seen" in faults:
            sees |= (torch.arange(len(row)) == 0) & (row[:, None] == 1)
        scores = (x @ self.q) @ (x @ self.k).T
        if "keys have no gradient beside others" in faults and len(documents) > 1:
            scores = (x @ self.q) @ (x @ self.k).T.detach()
        if "later tokens are seen" in faults:
            sees = row[:, None] == row
        mixed = scores.masked_fill(~sees, -torch.inf).softmax(-1) @ (x @ self.v)
        return list(((x + mixed) @ self.embedding.T).split(lengths.tolist()))

    def losses(self, documents, *faults):
        pairs = zip(self.logits(documents, *faults), documents, strict=True)
        return [cross_entropy(z[:-1], torch.tensor(own)[1:], reduction="none") for z, own in pairs]

    def mean(self, documents, *faults):
        if "the next document is predicted" in faults:
            joined = [*chain(*documents)]
            return cross_entropy(torch.cat(self.logits(documents))[:-1], torch.tensor(joined[1:]))
        losses = self.losses(documents, *faults)
        if "it is the mean of means" in faults:
            return torch.stack([own.mean() for own in losses if len(own)]).mean()
        return torch.cat(losses).mean()


MODEL = Tiny()
PARAMETERS = tuple(MODEL.parameters())
PACKED = (MODEL.logits, VOCABULARY, PARAMETERS)


@pytest.mark.parametrize("run", [MODEL.logits, MODEL.losses, MODEL.mean])
def test_documents_that_do_not_see_each_other_pass(run):
    reports = check_packing(run, VOCABULARY, PARAMETERS)
    assert sum(report.checked for report in reports) == (2 if run == MODEL.mean else 3)


@pytest.mark.parametrize(
    ("run", "fault", "said"),
    [
        (MODEL.logits, "positions go on", ""),
        (MODEL.losses, "attention looks across", ""),
        (MODEL.logits, "the first token of a neighbour is seen", ""),
        (MODEL.logits, "keys have no gradient beside others", ""),
        (MODEL.mean, "attention looks across", ""),
        (MODEL.mean, "the next document is predicted", ""),
        (MODEL.mean, "it is the mean of means", ""),
        (MODEL.logits, "later tokens are seen", "causal: .*in front of token"),
        (MODEL.losses, "later tokens are seen", "causal: .*in front of token"),
        (
            lambda documents, _: [0 * z for z in MODEL.logits(documents)],
            "",
            "causal: .*the same result",
        ),
        (lambda documents, _: 0 * MODEL.mean(documents), "", "causal: .*the same result"),
        (torch.no_grad()(MODEL.logits), "", "gradients: .*found 0 for all parameters"),
        (lambda documents, _: [z[:, 0] for z in MODEL.logits(documents)], "", r"alone: .*found the shape \(3,\)"),
    ],
)
def test_a_document_that_is_another_beside_others_and_what_hides_it_are_refused(run, fault, said):
    with pytest.raises(CheckFailure, match=f"(?s)packing-{said}") as caught:
        check_packing(lambda documents: run(documents, fault), VOCABULARY, PARAMETERS)
    assert caught.value.causes == ()


def test_plain_tuples_are_checked_as_the_arguments_of_the_functions_are():
    packed = (MODEL.logits, VOCABULARY)
    assert [report.checked for report in check(packed, "packing")] == [True, True, False]
    assert laws("packing")["gradients"].check((*packed, PARAMETERS)).checked
    assert laws("generation")["greedy"].check(decoder("")).checked
    with pytest.raises(CheckFailure, match="packing-alone: document"):
        laws("packing")["alone"].check(
            (lambda documents: MODEL.logits(documents, "attention looks across"), VOCABULARY)
        )
    with pytest.raises(CheckFailure, match="missing 1 required positional argument: 'vocabulary'"):
        check((MODEL.logits,), "packing")


def test_our_documents_and_our_cache_pass():
    llama = tiny_model(dtype=torch.float64)

    def run(documents):
        lengths = [len(document) for document in documents]
        hidden = llama.model(torch.tensor([*chain(*documents)]), Documents(lengths))
        return list(llama.get_output_embeddings()(hidden).split(lengths))

    def recomputed(tokens):
        with torch.no_grad():
            return llama(torch.tensor([tokens]))[0]

    size = llama.config.vocab_size
    check_packing(run, size, [p for p in llama.parameters() if p.requires_grad])
    check_generation(lambda prompts, n: ml.generate(llama, prompts, max_new_tokens=n), recomputed, size)


def decode(prompts, new, fault):
    """Greedy decoding that computes all anew, with a mistake."""
    answers, window = [], 8 if fault == "the cache is too short" else 10**6
    for prompt in prompts:
        tokens = list(prompt)
        for _ in range(new):
            seen = tokens[-window:]
            rounded = torch.bfloat16 if fault == "logits are rounded to 16 bits" else torch.float64
            if fault == "padding is seen" and prompt != max(prompts, key=len):
                seen = [0] * (len(max(prompts, key=len)) - len(prompt)) + tokens
            tokens.append(int(MODEL.logits([seen])[0][-1].to(rounded).argmax()))
        answers.append(tokens[len(prompt) :])
    if fault == "an answer ends early":
        answers = [answer[:-1] for answer in answers]
    if fault == "the answers are sorted":
        answers = sorted(answers)
    return answers


def decoder(fault):
    return lambda prompts, n: decode(prompts, n, fault), lambda tokens: MODEL.logits([tokens])[0], VOCABULARY


@pytest.mark.parametrize(
    "fault",
    [
        "the cache is too short",
        "padding is seen",
        "an answer ends early",
        "the answers are sorted",
        "logits are rounded to 16 bits",
    ],
)
def test_decoding_that_is_not_that_of_the_model_is_refused(fault):
    with pytest.raises(CheckFailure, match="generation-greedy"):
        check_generation(*decoder(fault))
