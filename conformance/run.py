"""Give every case of the kit to a reader of PEFT's files, and print what it computes.

    python conformance/run.py [--dtype float32|bfloat16] -- COMMAND

For each case, COMMAND is called with BASE TOKENS OUT [ADAPTER ...]: the directory of a model, a JSON list of tokens,
the file to write, and directories of adapters that act together. It writes the logits, (tokens, vocabulary), as an
.npy file or as JSON, and exits with 0. Any other status means that it refuses the case. `--dtype` is the one in which
it computes.

Prints a table in Markdown. The status is 1 if an answer is wrong; to refuse a case is no wrong answer. Needs only numpy
and safetensors.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

Array = NDArray[Any]
HERE = Path(__file__).parent
SECONDS = 600  # that a case may take


def read_kit(directory: Path = HERE) -> tuple[dict[str, dict[str, Any]], dict[str, Array]]:
    """Return the cases by name, and all logits, of files that are as they were made."""
    manifest = json.loads((directory / "manifest.json").read_bytes())
    for name, expected in manifest["files"].items():
        if hashlib.sha256((directory / name).read_bytes()).hexdigest() != expected:
            raise SystemExit(f"{directory / name} is not the file that the manifest names")
    return manifest["cases"], load_file(directory / "logits.safetensors")


def distance(found: Array, expected: Array) -> float:
    """Return ‖found - expected‖ / ‖expected‖."""
    return float(np.sqrt(np.square(found - expected).sum() / np.square(expected).sum()))


def judge(found: Array, readings: Mapping[str, Array], tolerance: float) -> tuple[str, float]:
    """Return the reading whose logits were found, or "other", and how far they are from the right ones."""
    right = readings["right"]
    if found.shape != right.shape or not np.isfinite(found).all():
        return f"other: shape {found.shape}, or not finite", np.inf
    distances = {name: distance(found, logits) for name, logits in readings.items()}
    nearest = min(distances, key=distances.__getitem__)
    return nearest if distances[nearest] <= tolerance else "other", distances["right"]


def readings_of(name: str, case: Mapping[str, Any], logits: Mapping[str, Array]) -> dict[str, Array]:
    """Return the logits of a case as it is right, and as known mistakes make them."""
    return {"right": logits[name], **{wrong: logits[f"{name}: {wrong}"] for wrong in case["wrong"]}}


def ask(command: list[str], case: Mapping[str, Any], directory: Path) -> Array | str:
    """Return the logits that a reader computes, or why there are none."""
    with tempfile.TemporaryDirectory() as scratch:
        tokens, out = Path(scratch) / "tokens.json", Path(scratch) / "logits.npy"
        tokens.write_text(json.dumps(case["tokens"]))
        paths = [directory / case["base"], tokens, out, *(directory / adapter for adapter in case["adapters"])]
        try:
            run = subprocess.run([*command, *map(str, paths)], capture_output=True, text=True, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            return f"no answer in {SECONDS} seconds"
        if run.returncode or not out.exists():
            return " ".join(run.stderr.split())[-200:].replace("|", "\\|") or f"status {run.returncode}, no message"
        try:
            is_npy = out.read_bytes()[:1] == b"\x93"
            found = np.load(out, allow_pickle=False) if is_npy else json.loads(out.read_bytes())
            return np.asarray(found, dtype=np.float64)
        except (ValueError, TypeError):  # it has other things than numbers
            return np.array(np.nan)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("command", nargs="+", metavar="COMMAND")
    options = parser.parse_args(arguments)
    cases, logits = read_kit()
    verdicts: Counter[str] = Counter()
    print("| case | verdict | error / tolerance |\n|---|---|---|")
    for name, case in cases.items():
        tolerance, found = case["tolerance"][options.dtype], ask(options.command, case, HERE)
        if isinstance(found, str):
            verdict, ratio = f"refused: {found}", ""
        else:
            verdict, error = judge(found, readings_of(name, case, logits), tolerance)
            ratio = f"{error / tolerance:.2g}"
        verdicts[verdict if verdict == "right" else verdict.partition(":")[0]] += 1
        print(f"| {name} | {verdict} | {ratio} |", flush=True)
    print(", ".join(f"{count} {verdict}" for verdict, count in verdicts.items()))
    return int(not verdicts.keys() <= {"right", "refused"})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
