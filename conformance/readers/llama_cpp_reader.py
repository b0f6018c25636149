"""llama.cpp as a reader of the kit.

    python -m conformance.readers.llama_cpp_reader [--export] LLAMA_CPP PROGRAM BASE TOKENS OUT [ADAPTER ...]

LLAMA_CPP is a checkout of llama.cpp. Its converters make GGUF files in float32; they need the package sentencepiece.
PROGRAM is compiled from llama_cpp_logits.cpp, which shows the command. With --export the converter reads the adapter
that `minilora export` writes for it.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from conformance.readers.exported import exported


def piece(text: bytes, kind: int) -> bytes:
    """Return a piece of a SentencePiece model in protobuf's format: its text, a score of 0 and its kind."""
    entry = b"\x0a" + bytes([len(text)]) + text + b"\x15" + bytes(4) + b"\x18" + bytes([kind])
    return b"\x0a" + bytes([len(entry)]) + entry


# The converter needs a tokenizer, which the kit does not have. It adds tokens up to the size of the vocabulary.
TOKENIZER = piece(b"<unk>", 2) + piece(b"a", 1) + b"\x12\x02\x18\x02"  # the last field: a BPE model


def run(*words: object) -> None:
    """Run a command; if it fails, print its standard error and exit with its status."""
    result = subprocess.run([str(word) for word in words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    if result.returncode:
        sys.stderr.buffer.write(result.stderr)
        sys.exit(result.returncode)


if __name__ == "__main__":
    is_exported = sys.argv[1] == "--export"
    llama, program, base, tokens, out, *adapters = map(Path, sys.argv[1 + is_exported :])
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        if is_exported:
            adapters = exported(base, adapters, "llama.cpp", scratch / "adapter")
        shutil.copytree(base, scratch / "base")
        (scratch / "base" / "tokenizer.model").write_bytes(TOKENIZER)
        files = [scratch / f"{i}.gguf" for i in range(1 + len(adapters))]
        options = ("--outtype", "f32", "--outfile")
        run(sys.executable, llama / "convert_hf_to_gguf.py", scratch / "base", *options, files[0])
        for path, file in zip(adapters, files[1:], strict=True):
            run(sys.executable, llama / "convert_lora_to_gguf.py", path, "--base", scratch / "base", *options, file)
        run(program, tokens, out, *files)
