"""The tokenizer of a GGUF file, as tokenizer.json and tokenizer_config.json.

    python recipes/gguf_tokenizer.py FILE DIRECTORY

A GGUF file has the list of tokens and one of two things to merge text with: pairs of tokens in their order ("gpt2"), or
the scores of SentencePiece ("llama"), where the pair with the best score is merged first. It names the way in which
text is split before; the patterns are llama.cpp's [src/llama-vocab.cpp]. A name that is not known here is an error.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

import minilora as ml

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|%s"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|%s"
SPACES = r"\s+(?!\S)|\s+"
PATTERNS = {  # applied in order, each to the pieces of the one before
    "llama-bpe": [WORDS % ("{1,3}", SPACES)],
    "qwen2": [WORDS % ("", SPACES)],
    "smollm": [r"\p{N}", GPT2 % SPACES],
}
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # gguf.TokenType
SPECIAL = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "pad_token": "padding_token_id"}


def pairs_by_score(tokens: list[str], scores: list[float], types: list[int]) -> list[tuple[str, str]]:
    """Return the pairs of tokens whose texts make a token, those that make the token with the best score first."""
    vocabulary, pairs = set(tokens), []
    for token, score, kind in zip(tokens, scores, types, strict=True):
        for k in range(1, len(token) if kind == NORMAL else 0):
            if token[:k] in vocabulary and token[k:] in vocabulary:
                pairs.append((-score, k, token[:k], token[k:]))
    return [(left, right) for _, _, left, right in sorted(pairs)]


def build_tokenizer(keys: Mapping[str, Any]) -> Tokenizer:
    """Build the tokenizer of the keys "tokenizer.ggml.…", without their prefix."""
    tokens, types, split = keys["tokens"], keys["token_type"], keys.get("pre")
    ids = {token: number for number, token in enumerate(tokens)}
    if keys["model"] == "gpt2" and split in PATTERNS:
        merges = [tuple(pair.split(" ")) for pair in keys["merges"]]
        tokenizer = Tokenizer(models.BPE(ids, merges, ignore_merges=split == "llama-bpe"))
        splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PATTERNS[split]]
        as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, as_bytes])
        tokenizer.decoder = decoders.ByteLevel()
    elif keys["model"] == "llama":
        merges = pairs_by_score(tokens, keys["scores"], types)
        unknown = tokens[keys["unknown_token_id"]]
        tokenizer = Tokenizer(models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
        has_prefix = keys.get("add_space_prefix", True)
        before = [normalizers.Prepend("▁")] if has_prefix else []
        after = [decoders.Strip(" ", 1, 0)] if has_prefix else []
        tokenizer.normalizer = normalizers.Sequence([*before, normalizers.Replace(" ", "▁")])
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        tokenizer.decoder = decoders.Sequence([*steps, *after])
    else:
        known = f"'llama', and 'gpt2' with pre of {sorted(PATTERNS)}"
        raise ml.FormatError(
            f"tokenizer.ggml.model {keys['model']!r} with pre {split!r} cannot be read; known are {known}"
        )
    for token, kind in zip(tokens, types, strict=True):
        if kind in (CONTROL, USER_DEFINED):
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=kind == CONTROL)])
    if keys.get("add_bos_token", keys["model"] == "llama" or split == "llama-bpe"):
        bos = tokens[keys["bos_token_id"]]
        tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $A", None, [(bos, keys["bos_token_id"])])
    return tokenizer


def save_tokenizer(keys: Mapping[str, Any], directory: Path) -> None:
    """Write the tokenizer's files with its special tokens and chat template; `keys` are those of a GGUF file."""
    keys = {name.removeprefix("tokenizer."): value for name, value in keys.items()}
    ggml = {name.removeprefix("ggml."): value for name, value in keys.items()}
    tokenizer = build_tokenizer(ggml)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {name: ggml["tokens"][ggml[key]] for name, key in SPECIAL.items() if key in ggml}
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": keys.get("chat_template")}
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


if __name__ == "__main__":
    import gguf

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar="FILE", help="of llama.cpp, *.gguf")
    parser.add_argument("directory", type=Path, metavar="DIRECTORY", help="has the model")
    arguments = parser.parse_args()
    fields = gguf.GGUFReader(arguments.file).fields
    save_tokenizer({name: field.contents() for name, field in fields.items()}, arguments.directory)
