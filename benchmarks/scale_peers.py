"""`python -m benchmarks.scale_peers`: LoRA on two processes, by minilora and its peers, on the CPU by gloo.

Every side is a script of `scale_scripts`, started by torchrun: the least that a user writes who loads a model and an
adapter, trains, and saves the adapter. All have the same adapter and 4 rows of 512 tokens, which are a step and an
epoch. In each round every side has a turn, another one first. A side whose losses are not those of the first is
refused. The table goes into docs/scale.md, between the marks of its dtype.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from benchmarks import make, results, turns, work
from benchmarks.scale import launch, write
from benchmarks.work import Row, Training

SCRIPTS = Path(__file__).parent / "scale_scripts"
HEAD = ("script", "processes × threads", "tokens/s", "over the first", "peak of each process", "of all")


@dataclass(frozen=True)
class Side:
    """A script, what it is told besides the dtype, and how it is started."""

    script: str
    told: str = ""
    processes: int = 2
    threads: int = 1


SIDES = (
    Side("minilora", "replicated", processes=1, threads=2),
    Side("minilora", "replicated"),
    Side("minilora", "sharded"),
    Side("peft_ddp"),
    Side("peft_fsdp2"),
)


@dataclass(frozen=True)
class Turn:
    """What the processes of a side have measured."""

    checks: dict[str, float]
    seconds: list[float]  # of each step after the first: of the slowest process
    peaks: list[int]  # bytes of each process


def prepare(folder: Path, model: Path, rows: Sequence[Row]) -> None:
    """Write what the scripts read: model, adapter and rows."""
    (folder / "model").symlink_to(model.resolve())
    make.adapter(model, folder / "adapter", dora=False)
    (folder / "rows.json").write_text(json.dumps([tokens for tokens, _ in rows]), encoding="utf-8")


def turn(side: Side, folder: Path, dtype: str) -> Turn:
    """Start a side's processes; the loss of a step is the mean of theirs, which have equally many tokens."""
    script = SCRIPTS / f"{side.script}.py"
    words = ["-m", "benchmarks.scale_side", f"{folder}", f"{script}", dtype, side.told]
    launch(side.processes, words, side.threads)
    found = [json.loads((folder / f"{n}.json").read_text(encoding="utf-8")) for n in range(side.processes)]
    losses = [statistics.mean(each) for each in zip(*(rank["losses"] for rank in found), strict=True)]
    seconds = [max(each) for each in zip(*(rank["seconds"] for rank in found), strict=True)]
    return Turn({"loss": losses[0], "last loss": losses[-1]}, seconds, [rank["peak"] for rank in found])


def row(side: Side, turns_of_it: Sequence[Turn], first: Sequence[Turn], tokens: int) -> list[str]:
    """Return a row of the table: medians of all steps and of all peaks; a ratio of each round."""
    rates, firsts = ([tokens / statistics.median(each.seconds) for each in taken] for taken in (turns_of_it, first))
    peaks = [statistics.median(ranks) / 1e9 for ranks in zip(*(each.peaks for each in turns_of_it), strict=True)]
    rate = tokens / statistics.median(second for each in turns_of_it for second in each.seconds)
    ratios = results.spread([own / other for own, other in zip(rates, firsts, strict=True)])
    memory = (", ".join(f"{peak:.2f}" for peak in peaks) + " GB", f"{sum(peaks):.2f} GB")
    return [f"{side.script} {side.told}", f"{side.processes} × {side.threads}", f"{rate:,.0f}", ratios, *memory]


def measured(folder: Path, dtype: str, rounds: int) -> tuple[dict[Side, list[Turn]], dict[Side, str]]:
    """Return the turns of each side, and of those that failed or computed something else why they are refused."""
    bounds, refused = Training("", dtype, "fixed").bounds, dict[Side, str]()
    taken: dict[Side, list[Turn]] = {side: [] for side in SIDES}
    for number in range(rounds):
        first = number % len(SIDES)
        for side in (*SIDES[first:], *SIDES[:first]):
            if side not in refused:
                try:
                    taken[side].append(turn(side, folder, dtype))
                    print(side, taken[side][-1], flush=True)
                except subprocess.CalledProcessError as error:
                    refused[side] = f"exit status {error.returncode}"
        for side in set(SIDES) - set(refused):
            try:
                turns.check_same_work(taken[SIDES[0]][-1].checks, taken[side][-1].checks, bounds, side.script)
            except turns.RefusedError as error:
                refused[side] = f"{error}"
    return taken, refused


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="directory of SmolLM2-135M")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args(arguments)
    rows = work.rows("fixed", 4, work.config_of(args.model)["vocab_size"])
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name), args.model, rows)
        taken, refused = measured(Path(name), args.dtype, args.rounds)
    tokens, first = sum(len(tokens) for tokens, _ in rows), taken[SIDES[0]]
    table = results.table(HEAD, [row(side, taken[side], first, tokens) for side in SIDES if side not in refused])
    here = results.surroundings(torch.device("cpu"))
    parts = [f"{args.dtype}, {datetime.now(UTC):%Y-%m-%d}, {here['machine']}; {here['versions']}:", table]
    parts += [f"Refused: {side.script}, {why}." for side, why in refused.items()]
    write(f"peers {args.dtype}", "\n\n".join(parts))


if __name__ == "__main__":
    main()
