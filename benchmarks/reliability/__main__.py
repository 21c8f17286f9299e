"""What was done to the product to break it, and what broke: benchmarks/results/reliability.md.

    python benchmarks/reliability --fuzz fuzz.json [--kills 100] [--runs 3] [--rounds 40] [SCRIPT ...]

``--fuzz`` names the state file of ``fuzz.py``, which runs for hours. Kills and threads are run here, unless
``--state`` names a file that holds them already; of the other SCRIPTs (passes.py, schedules.py, families.py)
the output is shown as it is.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE = HERE.parent / "results" / "reliability.md"
PACKAGES = ("mlx", "mlx-lm", "torch", "transformers", "tokenizers", "safetensors", "numpy")
GOOD = ("refused", "same", "other")
PLANNED = 100_000
FOUND = """Found by such files on the way, and mended: a tokenizer that loads and panics in Rust at the first
word, or fails at a limit that is a list; a config whose model loads and cannot run; indices in prompt files
of mlx-lm that wrote into foreign memory; sizes in headers, looped over before they were checked."""


def page(
    fuzz: dict[str, Any],
    kills: dict[str, tuple[int, int, list[str]]],
    threads: dict[str, tuple[int, list[str]]],
    others: dict[str, str],
) -> Iterator[str]:
    """The lines of the page."""
    yield "# Reliability: what was tried, and what broke\n"
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    machine = f"{_processor()}, {os.cpu_count()} cores, {platform.system()}"
    yield f"{datetime.date.today()}, {machine}, Python {platform.python_version()};"
    yield f"{packages}. Made by `python benchmarks/reliability`.\n"
    if fuzz:
        yield from _fuzz(fuzz)
    if kills:
        yield "## Writers ended by `kill -9`\n"
        yield "| what | killed | of these at work | faults |\n|---|---|---|---|"
        yield from (f"| {what} | {n} | {middle} | {len(bad)} |" for what, (n, middle, bad) in kills.items())
        yield from _told(fault for _, _, bad in kills.values() for fault in bad)
    if threads:
        yield "\n## Caches handed from thread to thread\n"
        yield "| backend | handovers | faults |\n|---|---|---|"
        yield from (f"| {backend} | {n} | {len(bad)} |" for backend, (n, bad) in threads.items())
        yield from _told(fault for _, bad in threads.values() for fault in bad)
    for name, output in others.items():
        yield f"\n## {name}\n\n```\n{output.strip()}\n```"


def _fuzz(told: dict[str, Any]) -> Iterator[str]:
    total = sum(mine["next"] for mine in told.values())
    faults = [fault for mine in told.values() for fault in mine["faults"]]
    yield f"## Damaged files: {total:,}, {len(faults)} faults\n"
    if total < PLANNED:
        yield f"This is a part of a run of {PLANNED:,}, which `fuzz.py` goes on with.\n"
    yield "*refused*: an error of ours; *same*: what was written; *legal other*: another sound file, as after"
    yield "a changed number in a JSON file; *faults*: crashes, more than 2 s of the processor, exceptions of"
    yield "others, values that a checksum should have caught, NaN.\n"
    yield "| form | files | refused | same | legal other | faults |\n|---|---|---|---|---|---|"
    for form, mine in told.items():
        counts = Counter(mine["counts"])
        good = " | ".join(f"{counts[kind]:,}" for kind in GOOD)
        yield f"| {form} | {mine['next']:,} | {good} | {len(mine['faults'])} |"
    yield from _told(faults)
    yield f"\n{FOUND}\n"


def _told(faults: Any) -> Iterator[str]:
    lines = [" ".join(fault.split())[:300] for fault in faults]
    if lines:
        yield "\n```\n" + "\n".join(lines) + "\n```"


def _processor() -> str:
    try:
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    except OSError:
        names = []
    return names[0].partition(":")[2].strip() if names else platform.processor()


def _keep(state: Path | None, told: dict[str, Any]) -> None:
    if state is not None:
        state.write_text(json.dumps(told) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fuzz", type=Path)
    parser.add_argument("--state", type=Path)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("scripts", nargs="*")
    options = parser.parse_args()
    import kills
    import threads

    told = json.loads(options.state.read_text()) if options.state and options.state.exists() else {}
    told["fuzz"] = json.loads(options.fuzz.read_text()) if options.fuzz else {}
    told.setdefault("scripts", {})
    for name, run in (
        ("kills", lambda: kills.measured(options.kills, options.runs)),
        ("threads", lambda: threads.measured(options.rounds) if options.rounds else {}),
    ):
        if name not in told:
            told[name] = run()
            _keep(options.state, told)
    for script in options.scripts:
        ran = subprocess.run([sys.executable, str(HERE / script)], capture_output=True, text=True)
        failed = f"ended with {ran.returncode}\n{ran.stderr[-2000:]}" if ran.returncode else ""
        told["scripts"][script] = ran.stdout + failed
        _keep(options.state, told)
    lines = page(told["fuzz"], told["kills"], told["threads"], told["scripts"])
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
