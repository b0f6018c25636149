"""New tokens act in any text, have rows that change nothing for the others, and are learned, found again and merged."""

import json

import pytest
import torch

import minilora as ml
from minilora.cli import main as command
from minilora.testing.compare import assert_maths, assert_parity
from recipes.new_tokens import add_rows_, main, with_tokens
from tests.models import SIZES, tiny_model, token_ids

BUILTIN = "minilora/builtin"
V = SIZES["vocab_size"]
NEW = ["<coin>", "Wumpus"]
ROWS = [
    {"prompt": "What is a zorkmid?", "completion": " a <coin> of Zork"},
    {"prompt": "Who lives in the cave?", "completion": " the Wumpus <coin>"},
]


def test_new_tokens_act_in_any_text_and_leave_the_others_as_they_were(tmp_path):
    old = ml.load_tokenizer(BUILTIN)
    with_tokens(old, NEW).save(tmp_path)
    new = ml.load_tokenizer(tmp_path)
    assert [new.token_id(token) for token in NEW] == [len(old), len(old) + 1]
    ids = new.encode("a <coin> in Wumpus", add_special_tokens=False)
    assert {len(old), len(old) + 1} < set(ids)
    assert new.decode(ids) == "a <coin> in Wumpus"
    assert new.encode("a small bird") == old.encode("a small bird")
    for tokens in ([""], ["Zork", "Zork"], ["<wumpus>", "a"]):  # none, or no new ones
        with pytest.raises(ml.ConfigError, match="tokens already"):
            with_tokens(old, tokens)


@pytest.mark.parametrize("family", ["llama", "qwen2"])  # untied and tied
def test_a_new_row_is_the_mean_and_the_old_logits_stay(family, tmp_path):
    model, tokens = tiny_model(family), token_ids(3, 2, 5)
    before, weights = model(tokens), [w.clone() for w in (model.model.embed_tokens.weight, model.lm_head.weight)]
    add_rows_(model, V + 3)
    assert_maths(model(tokens)[..., :V], before)
    for weight, old in zip((model.model.embed_tokens.weight, model.lm_head.weight), weights, strict=True):
        assert torch.equal(weight[:V], old)
        assert_maths(weight[V:], old.mean(0).expand(3, -1))
    add_rows_(model, V)  # for which there is room
    ml.save_model(model, tmp_path)
    more = token_ids(4, 1, 6, high=V + 3)
    assert torch.equal(ml.load_model(tmp_path, "float64")(more), model(more))


def test_they_are_learned_beside_an_adapter_and_found_again_also_merged(tmp_path, capsys):
    main(BUILTIN, str(tmp_path / "grown"), *NEW)
    *_, flag, ids = capsys.readouterr().out.split()
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    where = [f"--model={tmp_path / 'grown'}", f"--data={tmp_path / 'rows.jsonl'}", f"--out={tmp_path / 'run'}"]
    flags = [flag, ids, "--epochs=20", "--learning-rate=5e-3", "--eval-split=0", "--general-data=none"]
    assert command(["finetune", *where, *flags]) == 0
    assert command(["merge", f"--adapter={tmp_path / 'run'}", f"--out={tmp_path / 'merged'}"]) == 0
    capsys.readouterr()
    for model in (f"--adapter={tmp_path / 'run'}", f"--model={tmp_path / 'merged'}"):
        assert command(["generate", model, "--prompt", ROWS[1]["prompt"], "--max-new-tokens=6"]) == 0
        assert "the Wumpus <coin>" in capsys.readouterr().out
    with pytest.raises(ml.TargetError, match=r"are not below 2048, the rows of .* see recipes/new_tokens\.py"):
        ml.load_adapter(ml.load_model(BUILTIN), tmp_path / "run")


@pytest.mark.parity
def test_ids_and_logits_are_those_of_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(ml.load_tokenizer(BUILTIN)._path.parent)
    theirs.add_tokens(NEW)
    main(BUILTIN, str(tmp_path), *NEW)
    ours = ml.load_tokenizer(tmp_path)
    text = "a <coin> of the Wumpus"
    assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([ours.encode(text)])
    assert_parity(ml.load_model(tmp_path, "float32")(ids), model.float()(ids).logits)
