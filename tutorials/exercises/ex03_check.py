"""What a solution of exercise 3 must do."""

from __future__ import annotations

import math
from types import ModuleType

import torch
from tokenizers import Tokenizer

from minilora.data import encode_row
from minilora.files import ASSETS
from minilora.testing.reference import masked_loss

END = 0  # of the built-in tokenizer; the pad, too
TEXTS = (("Category:", " animal"), ("Category: ", "animal"), ("2 + 2 =\n", "4"), ("", "a young cat"))
ROWS = [  # tokens and labels
    ([5, 3, 1, END], [-100, -100, 1, END]),
    ([2, 4, 3, 3, 1, 2, 5, END], [-100, 4, 3, 3, 1, 2, 5, END]),
    ([4, END], [-100, END]),
]


def check(answer: ModuleType) -> None:
    """The labels are those of `encode_row`, and the losses those of `minilora.testing.reference`."""
    tokenizer = Tokenizer.from_file(str(ASSETS / "model" / "tokenizer.json"))
    for prompt, completion in TEXTS:
        right = encode_row({"prompt": prompt, "completion": completion}, tokenizer, END)
        tokens, labels = answer.encode(prompt, completion, tokenizer, END)
        case = f"encode({prompt!r}, {completion!r})"
        assert tokens == right.tokens, f"{case}: the tokens are {tokens}, need those of the text and the end token"
        assert labels[-1] == END, f"{case}: the end token has no label, so the model would not learn to stop"
        assert labels == right.labels, (
            f"{case}: the labels are {labels}, need {right.labels}. A tokenizer may join the end of the prompt and the "
            "beginning of the completion in one token: ask which tokens share a character with the completion"
        )
    generator = torch.Generator().manual_seed(0)
    scores = 2 * torch.randn(6, 6, generator=generator, dtype=torch.float64)  # the logits after each token
    for rows in ([ROWS[1]], ROWS):
        check_batch(answer, rows, scores)
    loss = answer.step_loss(scores.__getitem__, [answer.collate([row], END) for row in ROWS])
    means = [expected([row], scores) for row in ROWS]
    assert not is_near(loss, sum(means) / len(means)), (
        "step_loss is a mean of means: a label of a short row weighs more than one of a long row. "
        "Add up the sums, add up the counts, and divide once"
    )
    right_loss = expected(ROWS, scores)
    assert is_near(loss, right_loss), f"step_loss of three micro-batches is {float(loss):.6f}, need {right_loss:.6f}"


def check_batch(answer: ModuleType, rows: list[tuple[list[int], list[int]]], scores: torch.Tensor) -> None:
    """`collate` and `token_loss` together give the sum and the number of the labels."""
    input_ids, targets = answer.collate(rows, END)
    total, count = answer.token_loss(scores[input_ids], targets)
    right = sum(label != -100 for _, labels in rows for label in labels[1:])
    assert count != right - len(rows), (
        f"{len(rows)} rows: {int(count)} labels are counted, need {right}: one of each row is missing. Is the end "
        "token taken for a pad, or are the labels moved twice?"
    )
    assert count == right, f"{len(rows)} rows: {int(count)} labels are counted, not {right}: pads and prompts have none"
    mean = expected(rows, scores)
    assert is_near(total / count, mean), (
        f"{len(rows)} rows: token_loss is {float(total):.6f} over {int(count)} labels, need {mean * right:.6f}: the "
        "sum of -log p, where the logits at each position predict the token after it, and not the one after that"
    )


def expected(rows: list[tuple[list[int], list[int]]], scores: torch.Tensor) -> float:
    """The mean loss of some rows, by loops."""
    width = max(len(tokens) for tokens, _ in rows)
    tokens = torch.tensor([tokens + [END] * (width - len(tokens)) for tokens, _ in rows])
    labels = torch.tensor([labels + [-100] * (width - len(labels)) for _, labels in rows])
    return masked_loss(scores[tokens].numpy(), labels.numpy())


def is_near(loss: torch.Tensor, right: float) -> bool:
    return math.isclose(float(loss), right, rel_tol=1e-9)
