"""Give every case of the kit to a reader of PEFT's files, and print what it computes.

    python conformance/run.py [--dtype float32|bfloat16] -- COMMAND

For each case, COMMAND is called with BASE TOKENS OUT [ADAPTER ...]: the directory of a model, a JSON list of tokens,
the file to write, and directories of adapters that act together; all paths are absolute. It writes the logits,
(tokens, vocabulary), as an .npy file or as JSON, and exits with 0. Any other status means that it refuses the case.
`--dtype` is the one in which it computes.

Prints a table in Markdown. The status is 1 if an answer is wrong or a base is refused; to refuse an adapter is no wrong
answer. Needs only numpy and safetensors.
"""

import argparse
import hashlib
import json
import re
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
    if found.shape != right.shape:
        return f"other: shape {found.shape}, not {right.shape}", np.inf
    if not np.isfinite(found).all():
        return "other: not finite", np.inf
    distances = {name: distance(found, logits) for name, logits in readings.items()}
    nearest = min(distances, key=distances.__getitem__)
    return nearest if distances[nearest] <= tolerance else "other", distances["right"]


def readings_of(name: str, case: Mapping[str, Any], logits: Mapping[str, Array]) -> dict[str, Array]:
    """Return the logits of a case as it is right, and as known mistakes make them."""
    return {"right": logits[name], **{wrong: logits[f"{name}: {wrong}"] for wrong in case["wrong"]}}


def ask(command: list[str], case: Mapping[str, Any], directory: Path) -> Array | str:
    """Return the logits that a reader computes, or the verdict if there are none."""
    with tempfile.TemporaryDirectory() as scratch:
        tokens, out = Path(scratch) / "tokens.json", Path(scratch) / "logits.npy"
        tokens.write_text(json.dumps(case["tokens"]))
        paths = [directory / case["base"], tokens, out, *(directory / adapter for adapter in case["adapters"])]
        try:
            call = [*command, *map(str, paths)]
            run = subprocess.run(call, capture_output=True, text=True, errors="replace", timeout=SECONDS)
        except subprocess.TimeoutExpired:
            return f"other: no answer in {SECONDS} seconds"
        except OSError as error:
            raise SystemExit(f"{command[0]}: {error.strerror}") from None
        if run.returncode:
            lines = run.stderr.strip().splitlines() or [f"status {run.returncode}, no message"]
            errors = [line for line in lines if re.match(r"[\w.]*Error\b", line)]
            return "refused: " + (errors or lines[-1:])[0][:200].replace("|", "\\|")
        if not out.is_file():
            return "other: no file"
        try:
            is_npy = out.read_bytes()[:1] == b"\x93"
            found = np.load(out, allow_pickle=False) if is_npy else json.loads(out.read_bytes())
            return np.asarray(found, dtype=np.float64)
        except (ValueError, TypeError, OverflowError, RecursionError):
            return "other: neither .npy nor JSON of numbers"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("command", nargs="+", metavar="COMMAND")
    options = parser.parse_args(arguments)
    cases, logits = read_kit()
    verdicts: Counter[str] = Counter()
    status = 0
    print("| case | verdict | error / tolerance |\n|---|---|---|")
    for name, case in cases.items():
        tolerance, found = case["tolerance"][options.dtype], ask(options.command, case, HERE)
        if isinstance(found, str):
            verdict, ratio = found, ""
        else:
            verdict, error = judge(found, readings_of(name, case, logits), tolerance)
            ratio = f"{error / tolerance:.2g}"
        kind = verdict.partition(":")[0]
        verdicts[kind] += 1
        status |= kind != "right" and not (kind == "refused" and case["adapters"])
        print(f"| {name} | {verdict} | {ratio} |", flush=True)
    print(", ".join(f"{count} {verdict}" for verdict, count in verdicts.items()))
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
