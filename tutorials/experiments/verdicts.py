"""The verdicts of docs/paper_claims.md that follow from stored runs, by the rule at its head.

    python tutorials/experiments/verdicts.py     prints each claim with its interval and its verdict

The files with a plan, and `12_paired.json`, have the outcome of each row. Of the other experiments only the values of
the seeds are stored, so the interval does not cover other rows; their margins were chosen after the runs. Below stand
the planned intervals that Holm's correction leaves, with their corrected p.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from record import p_value, paired_interval, plan_hash, read_plan, seed_interval, verdict

HERE = Path(__file__).parent
DESCRIBED: dict[str, Callable[[Any], tuple[str, str]]] = {  # of a run of a planned file: its method, and where
    "sizes": lambda run: (run["method"], f"{run['rows']:,} rows"),
    "sizes_10m": lambda run: (run["method"], f"10M, {run['rows']:,} rows"),
    "sizes_texts": lambda run: (run["method"], f"{run['rows']:,} rows"),
    "sizes_texts_10m": lambda run: (run["method"], f"10M, {run['rows']:,} rows"),
    "sizes_smollm2": lambda run: (run["method"], f"SmolLM2, {run['rows']:,} rows"),
    "sizes_gemma3": lambda run: (run["method"], f"Gemma 3, {run['rows']:,} rows"),
    "10_equal": lambda run: (run["method"], f"{run['rows']:,} rows"),
    "10_replay": lambda run: (
        f"{run['remedy']} {run['rows']}",
        "100 steps" if run["factor"] == 1 else f"scaled by {run['factor']}",
    ),
    "10_slower": lambda run: (run["method"], run["adapter"]),
    "11_formats": lambda run: (run["way"], "1,000 rows"),
    "12_chosen": lambda run: (run["method"], "chosen rates"),
    "12_own": lambda run: (run["method"], f"{run['steps']} steps"),
    "12_seeds": lambda run: (run["method"], "8 seeds"),
}


RULES = {"05_rule": "", "05_rule_start": "", "05_rule_10m": ", 10M"}  # a plan of 05_rule.py: its model, if not built in


class Finding(NamedTuple):
    """A claim as a heading of the page, what was compared, more ± half of it, the verdict, and p if it was planned."""

    claim: str
    compared: str
    more: float
    half: float
    verdict: str
    p: float = math.nan


def stored(name: str) -> dict[str, Any]:
    return json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))


def seeds(name: str, key: str | Callable[[Any], float], **chosen: Any) -> list[float]:
    """One value per seed, in their order, of the runs with the chosen fields."""
    runs = [run for run in stored(name)["results"] if chosen.items() <= run.items()]
    read = key if callable(key) else lambda run: run[key]
    return [read(run) for run in sorted(runs, key=lambda run: run["seed"])]


def over_seeds(ones: list[float], others: list[float]) -> tuple[float, float]:
    return seed_interval([one - other for one, other in zip(ones, others, strict=True)])


def less_lora(method: str, rate: float, measure: str) -> tuple[float, float]:
    """A method's value less that of LoRA, over the seeds and the 800 rows."""
    runs = {(run["method"], run["rate"]): run["outcomes"] for run in stored("12_paired")["results"]}
    return paired_interval(rows_of(runs[method, rate], measure), rows_of(runs["LoRA", 2e-3], measure))


def earlier() -> Iterator[Finding]:
    """Yield the findings of experiments that had no plan."""

    def find(claim: str, compared: str, interval: tuple[float, float], expected: str, margin: float = 0.0) -> Finding:
        within = f", within {margin}" if margin else ""
        return Finding(claim, compared + within, *interval, verdict(expected, *interval, margin))

    where = {"attention": 4e-3, "MLPs": 4e-3, "all": 4e-3}
    for place in where:  # the other seeds try the best rate of the first
        where[place] = next(r["rate"] for r in stored("07_where")["results"] if (r["place"], r["seed"]) == (place, 1))

    def at(place: str, key: str) -> list[float]:
        return seeds("07_where", key, place=place, rate=where[place])

    claim = "At equal parameters the attention alone is worse than the MLPs"
    yield find(claim, "loss, attention - MLPs", over_seeds(at("attention", "loss"), at("MLPs", "loss")), "above")
    claim = "All linears are better than the MLPs alone"
    yield find(claim, "loss, all - MLPs", over_seeds(at("all", "loss"), at("MLPs", "loss")), "below")
    claim = "Adapters on the attention forget more"
    yield find(claim, "KL, attention - MLPs", over_seeds(at("attention", "kl"), at("MLPs", "kl")), "above")

    kl = [seeds("12_methods", "kl", method=method, rate=rate) for method, rate in (("LoRA", 2e-3), ("full", 4e-4))]
    yield find("LoRA forgets less", "KL, LoRA - full", over_seeds(*kl), "below")

    sums = [seeds("11_specialists", lambda run, way=way: sum(run[f"{way}, tuned"])) for way in ("TIES", "mean")]
    claim = "TIES combines two adapters with less loss than their mean"
    yield find(claim, "sum of losses, TIES - mean", over_seeds(*sums), "below")
    claim = "DoRA is more accurate than LoRA"
    yield find(claim, "loss, DoRA - LoRA", less_lora("DoRA", 2e-3, "loss"), "below")


def planned() -> Iterator[Finding]:
    """Yield the findings of the files that have a plan."""
    for name, describe in DESCRIBED.items():
        told, plan = stored(name), read_plan(str(HERE / name))
        assert told["plan"] == plan_hash(plan), f"{name}.json was made by another plan"
        outcomes: dict[str, dict[str, Any]] = {}
        beside = stored(plan["beside"])["results"] if "beside" in plan else []  # of the same settings
        for run in (*beside, *told["results"]):
            method, where = describe(run)
            outcomes.setdefault(where, {})[method] = run["outcomes"]
        for claim in plan["claims"]:
            of, less, measure = (claim[key] for key in ("of", "less", "measure"))
            for where, runs in outcomes.items():
                if {of, less} <= runs.keys():
                    interval = paired_interval(*(rows_of(runs[method], measure) for method in (of, less)))
                    expected, margin = claim["expected"], claim.get("margin", 0.0)
                    word, p = verdict(expected, *interval, margin), p_value(*interval, len(runs[of]), margin)
                    yield Finding(claim["claim"], f"{measure}, {of} - {less}, {where}", *interval, word, p)


def rule(name: str) -> Iterator[Finding]:
    """Yield the findings of a run of 05_rule.py: by how many powers of two the best rate falls from α = 4 to α = 64."""
    told, plan = stored(name), read_plan(str(HERE / name))
    assert told["plan"] == plan_hash(plan), f"{name}.json was made by another plan"
    best = {(run["steps"], run["alpha"]): [seed["log2"] for seed in run["runs"]] for run in told["results"]}
    for claim in plan["claims"]:
        steps, expected = claim["steps"], claim["log2"]
        more, half = over_seeds(best[steps, 4], best[steps, 64])
        word = verdict("equal", more - expected, half, claim["margin"])
        p = p_value(more - expected, half, len(best[steps, 4]), claim["margin"])
        where = RULES[name]
        where += f", A₀ times {plan['start']}" if "start" in plan else ""
        compared = f"log₂ of the best rate, α 4 - α 64, {expected} within {claim['margin']}{where}, {steps} steps"
        yield Finding(claim["claim"], compared, more, half, word, p)


def rows_of(outcomes: list[dict[str, list[int]]], measure: str) -> list[list[float]]:
    """The values of a measure, (seeds, rows): losses and divergences in nats, or a count, as of right answers."""
    unit = 1 if measure in ("right", "exact", "intruders") else 1e-4
    return [[unit * value for value in run[measure]] for run in outcomes]


def findings() -> list[Finding]:
    return [*earlier(), *chain.from_iterable(map(rule, RULES)), *planned()]


def holm(found: list[Finding]) -> tuple[list[Finding], int]:
    """Return the planned findings that stay at 5 % for all together, each with its corrected p, and how many there are.

    An interval that serves two claims counts once, for the first.
    """
    different = {finding.compared: finding for finding in reversed(found) if not math.isnan(finding.p)}
    kept, worst = [], 0.0
    for number, finding in enumerate(sorted(different.values(), key=lambda finding: finding.p)):
        worst = max(worst, (len(different) - number) * finding.p)
        if worst >= 0.05:
            break
        kept.append(finding._replace(p=worst))
    return kept, len(different)


if __name__ == "__main__":
    told = findings()
    for found in told:
        print(f"{found.verdict:15} {found.more:+.4f} ± {found.half:.4f}  {found.compared:48}  {found.claim}")
    kept, different = holm(told)
    planned = sum(not math.isnan(found.p) for found in told)
    print(f"\n{planned} intervals were planned, {different} different; Holm's correction leaves {len(kept)}:")
    for found in kept:
        print(f"p = {found.p:.4f}  {found.compared:48}  {found.claim}")
