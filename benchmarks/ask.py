"""What many questions about one reading cost, in readings: ``python benchmarks/ask.py [--backend mlx]``.

The demo model reads its story of 4,096 tokens once and is asked 20 questions, each of a copy of the cache;
some of them also of a reading of their own, which must answer the same. Times are seconds of the CPU, the
least of ``--repeat`` runs: others may be at work on the machine.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from typing import Any

import mlx_kvret
from mlx_kvret import demo

QUESTIONS = 20


def best(run: Callable[[], Any], repeat: int) -> tuple[float, Any]:
    """CPU seconds of the fastest run, and what it gave."""
    times = []
    for _ in range(repeat):
        start = time.process_time()
        found = run()
        times.append(time.process_time() - start)
    return min(times), found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--budget", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument(
        "--alone", type=int, default=3, help="questions that are also asked of their own reading"
    )
    options = parser.parse_args()
    model, tokenizer = mlx_kvret.load("demo", backend=options.backend)
    text = demo.STORY.read_text("utf-8")
    words = text.split()
    names = list(dict.fromkeys(b for a, b in itertools.pairwise(words) if a == "remember"))
    asked = [f"recall {names[n % len(names)]}" for n in range(QUESTIONS)]

    def read() -> Any:
        return mlx_kvret.read(model, tokenizer, text, budget=options.budget)

    reading, cache = best(read, options.repeat)
    asking, answers = best(
        lambda: mlx_kvret.answer(model, tokenizer, cache, asked, max_tokens=8), options.repeat
    )
    for question, answer in list(zip(asked, answers, strict=True))[: options.alone]:
        assert mlx_kvret.answer(model, tokenizer, read(), question, max_tokens=8) == [answer]
    print(f"{cache.seen:,} tokens read in {reading:.2f} s, {QUESTIONS} questions answered in {asking:.2f} s:")
    print(f"{(reading + asking) / reading:.2f} readings in all, {QUESTIONS} without copies")


if __name__ == "__main__":
    main()
