"""`python -m benchmarks`: measure works, keep what was measured as lines of JSON, and write RESULTS.md from all lines.

A run can be made in pieces: `--only NAME...` measures some works, and adds their rounds to those of this machine.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks import results, turns, work

HERE = Path(__file__).parent


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; 1 if a work was refused."""
    known = {each.name: each for each in [*work.trainings(), *work.operations()]}
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--model", type=Path, help="directory of SmolLM2-135M; without one its shapes, random weights")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3, help="turns of everyone at each work")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=known, default=list(known), help=", ".join(known))
    parser.add_argument("--peers", nargs="+", metavar="PEER", help="only these of a work's peers")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, default=HERE / "RESULTS.md", help="its lines lie beside it, as .jsonl")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    log, here = args.out.with_suffix(".jsonl"), results.surroundings(torch.device(args.device))
    state, refused = results.source(), False
    with tempfile.TemporaryDirectory() as folder:
        shop = turns.Workshop(Path(folder), args.model, args.device)
        for name in args.only:
            peers = [peer for peer in known[name].peers if args.peers is None or peer in args.peers]
            found = []
            try:
                for each in turns.rounds(shop.task(known[name]), [turns.OURS, *peers], args.rounds):
                    results.keep(log, here, state, asdict(each))
                    found.append(each)
                    print(results.spoken(known[name], found), flush=True)
            except turns.DifferentWorkError as error:
                results.keep(log, here, state, {"work": name, "refused": str(error)})
                refused = True
                print(f"{name}: refused, {error}", flush=True)
    args.out.write_text(results.page(results.kept(log, here), list(known.values())), encoding="utf-8")
    return int(refused)


if __name__ == "__main__":
    sys.exit(main())
