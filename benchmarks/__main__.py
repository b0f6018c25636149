"""`python -m benchmarks`: measure works, keep what was measured as lines of JSON, and write RESULTS.md from all lines.

A run can be made in pieces: `--only NAME...` measures some works, and adds their rounds to those of this machine.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks import ablation, results, turns, work
from benchmarks.process import Round

HERE = Path(__file__).parent


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; 1 if a work was refused."""
    known = {each.name: each for each in work.works()}
    groups = {"ablation": [each.name for each in work.ablations()]}
    peers = sorted({peer for each in work.trainings() for peer in each.peers})
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--model", type=Path, help="its directory; without one SmolLM2-135M's shapes, random weights")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=3, help="turns of everyone at each work")
    names = [*known, *groups]
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=names, default=list(known), help=", ".join(names))
    parser.add_argument("--peers", nargs="*", metavar="PEER", choices=peers, help="only these of a work's, or none")
    parser.add_argument("--out", type=Path, default=HERE / "RESULTS.md", help="its lines lie beside it, as .jsonl")
    parser.add_argument("--quick", action="store_true", help="the README's works beside PEFT, once, in a file here")
    args = parser.parse_args(arguments)
    if args.quick:
        args.only, args.peers, args.rounds = [each.name for each in work.trainings()[:7]], ["peft"], 1
        args.out = Path(f"benchmarks-{args.device}.md")
    log, here = args.out.with_suffix(".jsonl"), results.surroundings(torch.device(args.device))
    state, refused = results.code_hash(), False
    with tempfile.TemporaryDirectory() as folder:
        shop = turns.Workshop(Path(folder), args.model, args.device)
        for name in (name for asked in args.only for name in groups.get(asked, [asked])):
            found = []
            try:
                for each in measured(known[name], shop, args.rounds, args.peers):
                    results.keep(log, here, state, asdict(each))
                    found.append(each)
                    print(results.spoken(known[name], found), flush=True)
            except turns.RefusedError as error:
                results.keep(log, here, state, {"work": name, "refused": str(error)})
                refused = True
                print(f"{name}: refused, {error}", flush=True)
    kept = results.kept(log, here)
    args.out.write_text(results.page(kept, list(known.values())), encoding="utf-8")
    return int(refused)


def measured(each: work.Work, shop: turns.Workshop, rounds: int, peers: Sequence[str] | None) -> Iterator[Round]:
    """The rounds of a work."""
    if isinstance(each, work.Ablation):
        yield from ablation.rounds(each, shop, rounds)
    else:
        asked = [peer for peer in each.peers if peers is None or peer in peers]
        there = [peer for peer in asked if turns.is_installed(peer)]
        if missing := [peer for peer in asked if peer not in there]:
            print(f"{each.name}: {', '.join(missing)} not installed", file=sys.stderr)
        yield from turns.rounds(shop.task(each), [work.OURS, *there], rounds)


if __name__ == "__main__":
    sys.exit(main())
