"""Freeze what llama.cpp's converter makes of small models, so that tests need no llama.cpp.

python -m tests.golden.make_gguf LLAMA_CPP        (a checkout of llama.cpp, or its copy in llama-cpp-python's sources;
                                                  extra `parity`, and sentencepiece)
"""

import runpy
import sys
import tempfile
from pathlib import Path

import torch

import minilora as ml
from minilora.llama import Llama
from tests.models import tiny_model
from tests.text import write_tokenizer

DIRECTORY = Path(__file__).parent / "gguf"
ROPE_3_1 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192, "factor": 8.0}
TWO_ROPES = {"sliding_attention": {"rope_theta": 1e4}, "full_attention": {"rope_theta": 1e6}}
MODELS = {  # name: how its text is split, and what differs from the family's model of tests/models.py
    "llama-bias-tied-wide-heads": ("smollm", {}),
    "llama-3.1": ("llama-bpe", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **ROPE_3_1}}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen2", {"tie_word_embeddings": True}),
    "smollm3": ("llama-bpe", {"num_hidden_layers": 4}),
    "olmo2": ("smollm", {"tie_word_embeddings": True}),
    "gemma3": (
        "smollm",
        {"vocab_size": 356, "num_hidden_layers": 6, "layer_types": None, "rope_parameters": TWO_ROPES},
    ),
}


def model_of(name: str) -> Llama:
    """The model that a file has, in bfloat16."""
    changes = {"vocab_size": 400, "num_hidden_layers": 2, "query_pre_attn_scalar": 256, **MODELS[name][1]}
    return tiny_model(name, dtype=torch.bfloat16, **changes)


def main() -> None:
    sys.path[:0] = [sys.argv[1], f"{sys.argv[1]}/gguf-py"]
    from conversion.base import TextModel

    DIRECTORY.mkdir(exist_ok=True)
    for name, (split, _) in MODELS.items():
        TextModel.get_vocab_base_pre = lambda self, tokenizer, split=split: split  # by a hash of known tokenizers there
        with tempfile.TemporaryDirectory() as directory:
            ml.save_model(model_of(name), directory, write_tokenizer(Path(directory) / "tokenizer"))
            sys.argv[:] = ["convert", directory, "--outtype", "bf16", "--outfile", str(DIRECTORY / f"{name}.gguf")]
            runpy.run_path(f"{sys.path[0]}/convert_hf_to_gguf.py", run_name="__main__")


if __name__ == "__main__":
    main()
