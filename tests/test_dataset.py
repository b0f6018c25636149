"""Data sets: examples and counts are those of the rows one by one, and lean."""

import pytest

import minilora as ml
from minilora.cli.messages import repeated_prompts
from minilora.data import IGNORE_INDEX
from minilora.runs import encoders
from minilora.runs.encoders import Dataset, encode_rows, label_row
from minilora.runs.evaluate import find_choices
from minilora.runs.formats import Row, parse_row
from tests.runs import runner
from tests.text import BOS, CHATML, CLOSE, conversation

ROWS = [  # plain, a conversation, cut, without a label that is left, with a control token, bad in two ways, and others
    {"prompt": "the", "completion": " cat"},
    {"messages": conversation([("what?", "the sea"), ("and?", "the town")])},
    {"prompt": "the cat sat on the mat; ", "completion": "the dog ate the food. the end. the cat sat on the mat"},
    {"prompt": "the cat sat on the mat; the dog ate the food. the end. the cat sat on the mat", "completion": "yes"},
    {"prompt": f"the {BOS}", "completion": "cat"},
    {"prompt": "the"},
    {"text": "the town by the sea"},
    {"messages": conversation([("what?", "")])},
    {"instruction": "say", "input": "it", "output": "it"},
]


def one_by_one(rows, tokenizer, config):
    """The examples and counts as they follow from the rows one by one."""
    kept, bad, lost, counts = [], [], set(), dict.fromkeys(("truncated", "unlabelled", "quoted", "conversations"), 0)
    for row in rows:
        try:
            if row.problem:
                raise ml.DataError(row.problem)
            whole, is_quoted, _ = label_row(parse_row(row.fields, config.system), tokenizer, config)
            if not whole.labelled:
                raise ml.DataError("no token of the row can be predicted, so there is nothing to train on")
        except ml.DataError as error:
            bad.append(f"{row.source}: {error}")
            continue
        limit = config.max_length
        cut = ml.Example(whole.tokens[:limit], whole.labels[:limit], row.source)
        counts["quoted"] += is_quoted
        counts["conversations"] += not row.fields.keys() & {"prompt", "text"}
        counts["truncated"] += len(whole.tokens) > limit
        counts["unlabelled"] += not cut.labelled
        kept += [cut] if cut.labelled else []
        lost |= {row.source} if cut.labelled < whole.labelled else set()
    return kept, {**counts, "cut": lost, "bad": bad}


@pytest.mark.parametrize("train_on", ["completion", "assistant", "all"])
def test_rows_and_counts_are_those_of_the_rows_encoded_one_by_one(tokenizer, train_on):
    config = ml.DataConfig(train_on=train_on, max_length=20, skip_bad_rows=True)
    chosen = tokenizer(template=CHATML, eos=CLOSE)
    rows = [Row(row, f"a:{i}") for i, row in enumerate([*ROWS, ROWS[0]])] + [Row(problem="none", source="b:1")]
    found = encode_rows(rows, chosen, config)
    kept, counts = one_by_one(rows, chosen, config)
    assert list(found) == kept
    assert {name: getattr(found, name) for name in counts} == counts
    assert all(counts[name] for name in ("truncated", "cut", "bad", "quoted"))


def test_there_are_no_choices_where_a_row_has_no_prompt():
    def row(prompt, answer):
        return ml.Example([*prompt, answer], [*[IGNORE_INDEX] * len(prompt), answer])

    few = [row([1], 5), row([1, 2], 6)] * 5
    assert find_choices(few) == [(5,), (6,)]
    assert find_choices([*few, row([], 5)]) is None


def test_held_out_rows_whose_prompt_is_trained_on_are_counted(tokenizer):
    def rows(*texts):
        pairs = [text.split(";") for text in texts]
        fields = [{"prompt": asked, "completion": answer} if asked else {"text": answer} for asked, answer in pairs]
        return encode_rows([Row(each) for each in fields], tokenizer(post="bos"), ml.DataConfig())

    def repeated(held_out, training):
        return repeated_prompts(held_out, training, tokenizer(post="bos"))

    training = rows("the cat; sat", "the sea; is", ";the town", "the; end")
    held_out = rows("the cat; ate", "the cat; sat", "the town; is", ";the town", ";the", "the sea; is", "; end")
    assert repeated(held_out, training) == 4
    assert repeated(training[:1], training[1:]) == repeated(Dataset(()), training) == 0
    near = rows(" The  Cat; sat", "thesea; is", "; THE\ntown", "the cat?; sat")
    assert repeated(near, training) == repeated(training, near) == 3


# --- runs ---


def test_progress_is_shown_while_rows_are_encoded(directory, tmp_path, capsys, monkeypatch):
    run = runner(directory, capsys, monkeypatch)
    words = ("--model=model", "--data=rows.jsonl", "--general-data=none", "--dry-run", f"--out={tmp_path}")
    assert "encoding" not in run("finetune", *words).err
    monkeypatch.setattr(encoders, "SHOWN", 20)
    assert run("finetune", *words).err.startswith("encoding rows.jsonl:20\n")
