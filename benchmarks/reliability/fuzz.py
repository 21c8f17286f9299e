"""100,000 damaged files of every form, read in processes that may die: tests/damage at length.

    python benchmarks/reliability/fuzz.py [--cases 100000] [--state fuzz.json] [--seconds 3600]

Goes on where the state file ends, and writes it when it is stopped by ctrl-C or SIGTERM. Files whose reading
takes long (models, caches) get a seventh of the cases of the others.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[2] / "tests"))
from damage.forms import FORMS
from damage.harness import Outcome, run

LONG = ("model", "weights", "shape", "tokenizer", "cache", "prompt", "gates trimkv")
PART = 500


def shares(cases: int) -> dict[str, int]:
    """How many cases of each form make up ``cases``."""
    weights = {form: 1 if form.startswith(LONG) else 7 for form in FORMS}
    return {form: -(-cases * weight // sum(weights.values())) for form, weight in weights.items()}


def fuzzed(cases: int, state: Path, seconds: float) -> dict[str, Any]:
    """Run what is missing in a state file, a part of each form in turn; returns its content."""
    told: dict[str, Any] = json.loads(state.read_text()) if state.exists() else {}
    wanted, ends = shares(cases), time.monotonic() + seconds
    while time.monotonic() < ends:
        open_forms = [form for form in FORMS if told.get(form, {}).get("next", 0) < wanted[form]]
        if not open_forms:
            break
        jobs = []
        for form in open_forms:
            first = told.get(form, {}).get("next", 0)
            part = max(PART * wanted[form] // max(wanted.values()), 25)
            jobs.append((form, first, min(wanted[form], first + part)))
        outcomes: dict[str, Outcome] = {}
        try:
            run(jobs, ends - time.monotonic(), outcomes)
        finally:
            for form, outcome in outcomes.items():
                mine = told.setdefault(form, {"next": 0, "counts": {}, "faults": []})
                mine["counts"] = dict(Counter(mine["counts"]) + outcome.counts)
                mine["faults"] += outcome.faults
                mine["next"] += outcome.cases
            state.write_text(json.dumps(told, indent=1) + "\n")
        done = sum(mine["next"] for mine in told.values())
        print(f"{done:,} of {sum(wanted.values()):,} files", file=sys.stderr, flush=True)
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--state", type=Path, default=Path("fuzz.json"))
    parser.add_argument("--seconds", type=float, default=1e9)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    told = fuzzed(options.cases, options.state, options.seconds)
    for form, mine in told.items():
        print(f"{form:18} {mine['next']:7,} {mine['counts']}")
        for fault in mine["faults"]:
            print(f"    {fault}")


if __name__ == "__main__":
    main()
