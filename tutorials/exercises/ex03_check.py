"""What a solution of exercise 3 must do."""

from __future__ import annotations

import math
from types import ModuleType

import torch
from tokenizers import Tokenizer

from minilora.files import ASSETS
from minilora.testing.reference import masked_loss

END = 0  # of the built-in tokenizer; the pad, too
TEXTS = (  # prompt and completion
    ("Category:", " animal"),
    ("Category: ", "animal"),
    ("2 + 2 =\n", "4"),
    ("Category: an", "imal"),
    ("", "a young cat"),
)
ROWS = [  # tokens and labels
    ([5, 3, 1, END], [-100, -100, 1, END]),
    ([2, 4, 3, 3, 1, 2, 5, END], [-100, 4, 3, 3, 1, 2, 5, END]),
    ([4, END], [-100, END]),
]
WIDTH = 8
SCORES = 2 * torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)  # after each token


def check_step_loss(answer: ModuleType) -> None:
    """`step_loss` is one sum over one count."""
    parts = [(torch.tensor(2.0), 2), (torch.tensor(60.0), 10), (torch.tensor(0.0), 0)]
    for some, right in ((parts[:1], 1.0), (parts[:2], 62 / 12), (parts, 62 / 12)):
        found = float(answer.step_loss(some))
        told = ", ".join(f"{total:g} over {count}" for total, count in some)
        assert found != 3.5, (
            f"sums of {told} labels: 3.5. Each label of the first counts five times as much as one of the second"
        )
        assert math.isclose(found, right, rel_tol=1e-6), (
            f"sums of {told} labels: the loss is {found:.4f}, and not {right:.4f}"
        )


def check_collate(answer: ModuleType) -> None:
    """`collate` pads tokens, and moves labels by one within each row; the end token keeps its label."""
    for rows in ([ROWS[1]], ROWS):
        input_ids, targets = (each.tolist() for each in answer.collate(rows, END))
        for i, (tokens, labels) in enumerate(rows):
            padding = WIDTH - len(tokens)
            right = [*labels[1:], -100] + [-100] * padding
            case = f"row {i} of {len(rows)}, labels {labels}"
            assert input_ids[i] == tokens + [END] * padding, f"{case}: the tokens are {input_ids[i]}"
            lost = [label for label in labels[1:] if label >= 0 and label not in targets[i]]
            assert not lost, f"{case}: the targets are {targets[i]}, and {lost[0]} is learned nowhere"
            assert targets[i] == right, (
                f"{case}: the targets are {targets[i]}, which are not the labels one place earlier"
            )


def check_token_loss(answer: ModuleType) -> None:
    """`token_loss` is the sum of -log p over all targets, and their number."""
    for rows in ([ROWS[1]], ROWS):
        tokens = torch.tensor([tokens + [END] * (WIDTH - len(tokens)) for tokens, _ in rows])
        labels = torch.tensor([labels + [-100] * (WIDTH - len(labels)) for _, labels in rows])
        targets = torch.cat([labels[:, 1:], torch.full((len(rows), 1), -100)], dim=1)
        total, count = answer.token_loss(SCORES[tokens], targets)
        right = int((targets >= 0).sum())
        case = f"targets {targets.tolist()}"
        assert int(count) == right, f"{case}: {int(count)} labels are counted of {right}"
        mean = masked_loss(SCORES[tokens].numpy(), labels.numpy())
        assert math.isclose(float(total), mean * right, rel_tol=1e-9), (
            f"{case}: the sum is {float(total):.4f}, and not {mean * right:.4f}; look at the logits beside each"
        )


def check_split_row(answer: ModuleType) -> None:
    """The text stays, and what the prompt's tokens are by themselves is how the row begins."""
    tokenizer = Tokenizer.from_file(str(ASSETS / "model" / "tokenizer.json"))
    for prompt, completion in TEXTS:
        row = tokenizer.encode(prompt + completion).ids
        found = answer.split_row(prompt, completion, tokenizer)
        case = f"split_row({prompt!r}, {completion!r})"
        assert isinstance(found, tuple), f"{case}: need a prompt and a completion"
        assert "".join(found) == prompt + completion, f"{case}: together they read {''.join(found)!r}. Was that asked?"
        assert len(found[0]) <= len(prompt), f"{case}: the prompt {found[0]!r} has a piece of the answer"
        own = tokenizer.encode(found[0]).ids
        assert row[: len(own)] == own, (
            f"{case}: by itself the prompt {found[0]!r} has the tokens {own}, and the row begins with {row[: len(own)]}"
        )
        longer = [prompt[:n] for n in range(len(found[0]) + 1, len(prompt) + 1)]
        others = [each for each in longer if row[: len(ids := tokenizer.encode(each).ids)] == ids]
        assert not others, f"{case}: the prompt {found[0]!r} is shorter than it must be"
