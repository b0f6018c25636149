"""Tokenizers that llama.cpp's converter wrote (`tests/golden/make_gguf.py`) give the tokens of those they were made of.

Those of scores, Gemma 3's among them, are compared with transformers' in `tests/parity/test_pretrained.py`.
"""

import runpy
import sys
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, pre_tokenizers

import minilora as ml
from tests.golden.make_gguf import DIRECTORY, MODELS
from tests.text import EOS, trained_bpe

pytestmark = pytest.mark.parity  # the package gguf
pytest.importorskip("gguf")
RECIPE = Path(__file__).parents[2] / "recipes" / "gguf_tokenizer.py"
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
QWEN = (  # of the tokenizer.json of Qwen 2 and, with up to three digits in a piece, of Llama 3
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = ["The cat sat.", "12 345, it's\n\n  THE'LL", "naïve 漢字 🙂\u0301 x²", " \t 7", "<|end|> is a token"]
SPLIT = {
    "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "qwen2": [pre_tokenizers.Split(Regex(QWEN % "{1}"), "isolated"), BYTES],
    "llama-bpe": [pre_tokenizers.Split(Regex(QWEN % "{1,3}"), "isolated"), BYTES],
}


@pytest.mark.parametrize("name", ["qwen2", "llama-3.1", "olmo2"])
def test_text_has_the_tokens_that_it_had(tmp_path, monkeypatch, name):
    split = MODELS[name][0]
    backend = Tokenizer.from_str(trained_bpe(True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(SPLIT[split])
    monkeypatch.setattr(sys, "argv", ["gguf_tokenizer.py", str(DIRECTORY / f"{name}.gguf"), str(tmp_path)])
    runpy.run_path(str(RECIPE), run_name="__main__")
    tokenizer = ml.load_tokenizer(tmp_path)
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == backend.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.special_tokens["eos_token"] == EOS
