"""Everything a GPU can tell about the torch backend, in one command: what matters most first.

    python benchmarks/gpu_check.py --out RESULTS                  # on a GPU, under nine minutes
    TRITON_INTERPRET=1 python benchmarks/gpu_check.py --tiny --together --out RESULTS    # on a CPU

Each part runs in a process of its own within its share of the time, so that one that fails, hangs or loses
the GPU stops no other. Every line is written when it is known: to RESULTS/gpu_check.jsonl, and as a page to
RESULTS/gpu_check.md. It ends with status 1 if a check came out wrong. Needs torch, triton, transformers.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

# part: its most seconds of 520, what it answers
PARTS: dict[str, tuple[int, str]] = {
    "kernels": (100, "The kernels against their twins"),
    "steps": (60, "Recorded steps against plain passes"),
    "bandwidth": (60, "Decode attention of one layer: share of copy bandwidth"),
    "decode": (110, "Whole steps, 4B"),
    "first-token": (80, "Time to the first token, and the peak of memory"),
    "decode-8b": (60, "Whole steps, 8B"),
    "sanitizer": (50, "compute-sanitizer on a few kernels"),
}


class Sink:
    """Where lines go: at once to the file, and into the page."""

    def __init__(self, folder: Path, end: float) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.lines, self.page, self._end = folder / "gpu_check.jsonl", folder / "gpu_check.md", end
        self.part = ""

    def put(self, what: str, **found: Any) -> None:
        """One line of the part; ``ok`` False where a check came out wrong."""
        line = {"part": self.part, "what": what} | found
        with self.lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, default=str) + "\n")
        print(json.dumps(line, default=str), flush=True)

    def left(self) -> float:
        """Seconds that the part still has."""
        return self._end - time.time()

    def rows(self) -> list[dict[str, Any]]:
        if not self.lines.exists():
            return []
        return [json.loads(line) for line in self.lines.read_text(encoding="utf-8").splitlines()]

    def write_page(self) -> None:
        """The page of all lines so far."""
        rows = self.rows()
        wrong = [row for row in rows if row.get("ok") is False]
        text = ["# What a GPU tells", ""]
        text.append(f"`python benchmarks/gpu_check.py`, {datetime.date.today()}; {len(wrong)} checks wrong.")
        for part, (_, title) in PARTS.items():
            own = [row for row in rows if row["part"] == part]
            text += ["", f"## {title}", ""] + ["- " + _told(row) for row in own or [{"what": "not run"}]]
        beside = self.page.with_suffix(".part")
        beside.write_text("\n".join(text) + "\n", encoding="utf-8")
        beside.replace(self.page)


def _told(row: dict[str, Any]) -> str:
    parts = [f"**{row['what']}**" + (" WRONG" if row.get("ok") is False else "")]
    for name, value in row.items():
        if name not in ("part", "what", "ok"):
            parts.append(f"{name.replace('_', ' ')} {value:.4g}" if isinstance(value, float) else
                         f"{name.replace('_', ' ')} {value}")  # fmt: skip
    return "; ".join(parts)


# ---------------------------------------------------------------- parts


def kernels(sink: Sink, few: bool = False) -> None:
    from gpu_kernels import check_kernels
    from gpu_timing import GPU, device_line

    sink.put("device", line=device_line())
    if not GPU and os.environ.get("TRITON_INTERPRET") != "1":
        sink.put("not run", why="no GPU, and TRITON_INTERPRET is not 1")
        return
    check_kernels(sink.put, sink.left, few)


def steps(sink: Sink) -> None:
    from gpu_steps import check_steps

    check_steps(sink.put, sink.left)


def bandwidth(sink: Sink) -> None:
    from gpu_tables import bandwidth_rows

    bandwidth_rows(sink.put, sink.left)


def decode(sink: Sink) -> None:
    from gpu_tables import Plan, decode_rows

    decode_rows(sink.put, sink.left, Plan.of("4B"))


def decode_8b(sink: Sink) -> None:
    from gpu_tables import Plan, decode_rows

    decode_rows(sink.put, sink.left, Plan.of("8B"))


def first_token(sink: Sink) -> None:
    from gpu_tables import Plan, first_token_rows

    first_token_rows(sink.put, sink.left, Plan.of("4B"))


def sanitizer(sink: Sink) -> None:
    """Out-of-bounds accesses and races of the kernels, on few cases, for it is slow."""
    import shutil

    found = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if found is None:
        sink.put("not run", why="compute-sanitizer is not installed")
        return
    for tool in ("memcheck", "racecheck"):
        if sink.left() < 20:
            return
        command = [found, "--tool", tool, "--print-limit", "5", sys.executable, __file__, "--few"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=sink.left() - 3)
        except subprocess.TimeoutExpired as error:
            out = (error.stdout or b"").decode(errors="replace")
            sink.put(tool, finished=False, errors=out.count("========= Error"), tail=out[-300:])
            continue
        summary = [line for line in done.stdout.splitlines() if "SUMMARY" in line]
        clean = all("0 errors" in line or "0 hazards" in line for line in summary) and bool(summary)
        sink.put(tool, ok=clean, summary=summary, tail="" if clean else done.stdout[-600:])


WORK: dict[str, Callable[[Sink], None]] = {
    "kernels": kernels, "steps": steps, "bandwidth": bandwidth, "decode": decode,
    "first-token": first_token, "decode-8b": decode_8b, "sanitizer": sanitizer,
}  # fmt: skip


def run_here(part: str, folder: Path, seconds: float) -> None:
    """A part in this process; what it fails with is a line too."""
    sink = Sink(folder, time.time() + seconds)
    sink.part = part
    start = time.time()
    try:
        WORK[part](sink)
    except Exception as error:
        sink.put("failed", ok=False, error=f"{type(error).__name__}: {str(error)[:600]}")
    sink.put("ended", seconds=round(time.time() - start, 1))


def run_apart(part: str, folder: Path, seconds: float) -> None:
    """A part in a process of its own, which is ended when its time is out."""
    sink = Sink(folder, time.time() + seconds)
    sink.part = part
    command = [sys.executable, __file__, "--part", part, "--seconds", str(seconds - 4), "--out", str(folder)]
    with (folder / "gpu_check.log").open("a", encoding="utf-8") as log:
        try:
            status = subprocess.run(command, stdout=log, stderr=log, timeout=seconds).returncode
        except subprocess.TimeoutExpired:
            sink.put("ended", ok=None, why=f"its {seconds:.0f} s were out")
            return
    if status:
        sink.put("failed", ok=False, why=f"its process ended with status {status}; see gpu_check.log")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("gpu_check"), help="folder for the results")
    parser.add_argument("--seconds", type=float, default=520, help="for all parts together (520)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="which (all)")
    parser.add_argument("--tiny", action="store_true", help="expect no GPU: tiny shapes on the CPU")
    parser.add_argument("--together", action="store_true", help="all parts in this process")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--few", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.few:
        from gpu_kernels import check_kernels

        check_kernels(lambda what, **found: print(what, found), lambda: 1e9, few=True)
        return 0
    if options.part:
        run_here(options.part, options.out, options.seconds)
        return 0
    import torch

    if torch.cuda.is_available() == options.tiny:
        parser.error("--tiny is for machines without a GPU, and only they need it")
    options.out.mkdir(parents=True, exist_ok=True)
    for name in ("gpu_check.jsonl", "gpu_check.md", "gpu_check.log"):
        (options.out / name).unlink(missing_ok=True)
    end, scale = time.time() + options.seconds, options.seconds / 520
    sink = Sink(options.out, end)
    for part in options.parts:
        seconds = min(PARTS[part][0] * scale, end - time.time())
        if seconds < 10 * min(scale, 1):
            sink.part = part
            sink.put("not run", why="time is out")
        elif options.together:
            run_here(part, options.out, seconds)
        else:
            run_apart(part, options.out, seconds)
        sink.write_page()
    wrong = [row for row in sink.rows() if row.get("ok") is False]
    print(f"{len(wrong)} checks wrong; {sink.page}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
