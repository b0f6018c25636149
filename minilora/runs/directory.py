"""What a run needs around its directory: the same inputs at every start, and room on the disk."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from pathlib import Path

from minilora.adapters.layout import CONFIG_FILE, WEIGHTS_FILE
from minilora.durable import sha256_of
from minilora.errors import TrainingError
from minilora.models.hub import fetch
from minilora.models.tokenizer import CONFIGS
from minilora.runs.config import RunConfig
from minilora.runs.memory import Forecast, amount

TOKENIZER = ("tokenizer.json", "chat_template.jinja", *CONFIGS)
WHOLE = 2**29  # bytes of a file up to which all of it is hashed
PIECES, PIECE = 64, 2**16  # number and size of the parts that are hashed of a larger file


def hash_inputs(run: RunConfig, prompt_style: str) -> dict[str, str]:
    """Return hashes of the files that a run starts from, besides its data: base, tokenizer, adapter and template."""
    base = fetch(run.model, "model")
    paths = {f"model/{path.name}": path for path in sorted(base.glob("*.safetensors"))}
    paths |= {f"model/{name}": base / name for name in ("config.json", *TOKENIZER)}
    if run.adapter is not None:
        adapter = fetch(run.adapter, "adapter")
        paths |= {f"adapter/{name}": adapter / name for name in (CONFIG_FILE, WEIGHTS_FILE, *TOKENIZER)}
    if prompt_style.endswith(".jinja"):
        paths["prompt_style"] = Path(prompt_style)
    return {name: hash_of(path) for name, path in paths.items() if path.is_file()}


def hash_of(path: Path) -> str:
    """Return the SHA-256 of a file; of a large one, that of its size, its beginning and evenly spread parts."""
    size = path.stat().st_size
    if size <= WHOLE:
        return sha256_of(path)
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        digest.update(file.read(8 + int.from_bytes(file.read(8), "little") % WHOLE))  # the header of tensors
        for i in range(PIECES):
            file.seek(i * (size - PIECE) // (PIECES - 1))
            digest.update(file.read(PIECE))
    return digest.hexdigest()


def check_same(what: str, before: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Raise a `TrainingError` that names the files whose hashes are not those of the run's first start."""
    if changed := sorted(name for name in before.keys() | now if before.get(name) != now.get(name)):
        raise TrainingError(f"{what} changed since the run began: {', '.join(changed[:5])}; give another --out")


def check_room(out: Path, found: Forecast) -> None:
    """Check that the disk has room for the result of a run and for one checkpoint.

    Raises:
        TrainingError: it has not.
    """
    need, free = 2 * found.gradients + found.moments, shutil.disk_usage(out).free  # a gradient is as large as a weight
    if free < need:
        raise TrainingError(
            f"{out}: the result and a checkpoint take {amount(need)}, and {amount(free)} are free on the disk; "
            "make room, or give another --out; --force runs all the same"
        )
