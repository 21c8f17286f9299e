"""Registers, spills and shared memory of the Triton kernels for the shapes of real models, in bfloat16.

``python benchmarks/triton_registers.py --write`` compiles for sm_80 and sm_90 and needs no GPU. What is
compiled is what a launch asks for: launches are noted instead of carried out (``tests/cuda/launches.py``).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import triton  # noqa: E402
from cuda.launches import MODELS, Launch, launches  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "triton_registers.md"
BITS = (None, 8, "k8v4", 4)
HEAD = ("kernel", "tokens", "K, V bits", "warps", "sm_80", "sm_90", "shared KB, sm_80 / sm_90")


def row(launch: Launch, tokens: str, bits: str) -> str:
    """A line of the table; registers, and bytes spilled where there are any."""
    made = [launch.compiled(capability) for capability in (80, 90)]
    said = [
        str(one.registers) + (f" ({sum(one.spills)} B spilled)" if any(one.spills) else "") for one in made
    ]
    shared = " / ".join(f"{one.shared / 1024:.0f}" for one in made)
    warps = str(dict(launch.options).get("num_warps", 4))
    return "| " + " | ".join([launch.name.removesuffix("_kernel"), tokens, bits, warps, *said, shared]) + " |"


def table() -> str:
    lines = [
        "# Registers of the Triton kernels\n",
        f"Triton {triton.__version__}, bfloat16: registers of a thread by ptxas, and bytes spilled (stored",
        "and loaded) where there are any. By `python benchmarks/triton_registers.py --write` without a GPU:",
        "nothing was timed.",
    ]
    for name, shape in MODELS.items():
        lines.append(
            f"\n## {name}: {shape.kv_heads} KV heads, {shape.group} query heads each, D = {shape.dim}\n"
        )
        lines += ["| " + " | ".join(HEAD) + " |", "|---" * len(HEAD) + "|"]
        for kv_bits in BITS:
            bits = "16" if kv_bits is None else str(kv_bits)
            for tokens in (1, 8):
                for launch in launches(shape, kv_bits, tokens=tokens):
                    # what reads and writes packed words differs by their bits, the others do not
                    if kv_bits is None or "scales" in str([n for n, t in launch.types if t.startswith("*")]):
                        which = (
                            "–"
                            if "attention" not in launch.name
                            else "64"
                            if "prefill" in launch.name
                            else tokens
                        )
                        lines.append(row(launch, str(which), bits))
                        print(lines[-1], flush=True)
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.relative_to(ROOT)}")
    options = parser.parse_args()
    text = table()
    if options.write:
        RESULTS.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
