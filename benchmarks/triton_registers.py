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


def row(launch: Launch, tokens: int, bits: str) -> str:
    """A line of the table; registers, and bytes spilled where there are any."""
    made = [launch.compiled(capability) for capability in (80, 90)]
    said = [
        str(one.registers) + (f" ({sum(one.spills)} B spilled)" if any(one.spills) else "") for one in made
    ]
    shared = " / ".join(f"{one.shared / 1024:.0f}" for one in made)
    constants, name = dict(launch.constants), launch.name.removesuffix("_kernel")
    for flag, words in {"TOGETHER": "counts by itself first", "IN_LOW": "low word"}.items():
        name += f", {words}" if constants.get(flag) else ""
    chunk = "chunks of rows" if constants.get("HAS_ROWS") else "chunk"
    which = chunk if "prefill" in name else str(tokens) if "decode" in name else "–"
    warps = str(dict(launch.options).get("num_warps", 4))
    return "| " + " | ".join([name, which, bits, warps, *said, shared]) + " |"


def told(launch: Launch, kv_bits: object, first: bool) -> bool:
    """Whether a launch is another one than those of the lines before."""
    packs = any(name.endswith("scales") and kind.startswith("*") for name, kind in launch.types)
    attends = "attention" in launch.name
    # what moves and selects does so for any model, and what knows no bits for any
    return (first or attends) and (kv_bits is None or packs)


def table() -> str:
    lines = [
        "# Registers of the Triton kernels\n",
        f"Triton {triton.__version__}, bfloat16: registers of a thread by ptxas, and bytes spilled (stored",
        "and loaded) where there are any. By `python benchmarks/triton_registers.py --write` without a GPU:",
        "nothing was timed. Kernels that move and select are the same for all models. Of a chunk the tiles",
        "of sm_90 are compiled for both; sm_80 runs smaller ones.",
    ]
    for name, shape in MODELS.items():
        heads = f"{shape.kv_heads} KV heads, {shape.group} query heads each, D = {shape.dim}"
        lines += [f"\n## {name}: {heads}\n", "| " + " | ".join(HEAD) + " |", "|---" * len(HEAD) + "|"]
        for kv_bits in BITS:
            for tokens in (1, 8):
                for launch in launches(shape, kv_bits, tokens=tokens):
                    if told(launch, kv_bits, name == next(iter(MODELS))):
                        lines.append(row(launch, tokens, "16" if kv_bits is None else str(kv_bits)))
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
