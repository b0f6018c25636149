"""Rows of a task that a program judges: a date in one of four formats is written as year-month-day.

    python scripts/make_dates.py DIR     writes train.jsonl, valid.jsonl and test.jsonl

There are 5,000 training rows; the smaller sets are their first 200 and 1,000. No year of `valid` or `test` is in
`train`, so counting words cannot answer, and counting tokens cannot order the digits.
"""

import json
import random
import sys
from pathlib import Path

MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
SPLITS = {"train": (5000, {2, 3, 4, 5, 6}), "valid": (200, {1}), "test": (400, {0})}  # rows; year modulo 7


def make_rows(split: str) -> list[dict[str, str]]:
    """Return different rows of a split, the same on every machine."""
    count, remainders = SPLITS[split]
    years = [year for year in range(1000, 3000) if year % 7 in remainders]
    draw, rows = random.Random(split), {}
    while len(rows) < count:
        year, month, day = draw.choice(years), draw.randrange(12), 1 + draw.randrange(28)
        formats = (
            f"{day} {MONTHS[month]} {year}",
            f"{MONTHS[month]} {day}, {year}",
            f"{day}.{month + 1}.{year}",
            f"{month + 1}/{day}/{year}",
        )
        rows[f"Date: {draw.choice(formats)}\nISO:"] = f" {year}-{month + 1:02}-{day:02}"
    return [{"prompt": prompt, "completion": completion} for prompt, completion in rows.items()]


def write_rows(directory: str) -> None:
    """Write the three files."""
    for split in SPLITS:
        lines = [json.dumps(row) + "\n" for row in make_rows(split)]
        Path(directory, f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    write_rows(sys.argv[1])
