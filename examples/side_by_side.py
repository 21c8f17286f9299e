"""One prompt, one budget, three ways to keep it: ``python examples/side_by_side.py``.

The demo model, trained on 256 tokens, reads a story of 4,096 tokens that states 16 facts among 512 false
ones, then is asked for each fact.
"""

from __future__ import annotations

import argparse
import copy
import time

import mlx_kvret
from mlx_kvret.demo import STORY
from mlx_kvret.demo.language import story

POLICIES = {
    "full cache": {"policy": "full"},
    "recent (4 sinks + window)": {"policy": "recent"},
    "learned, per head": {"scope": "head"},
    "learned, global": {},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget", type=int, default=64, help="tokens per KV head (64)")
    parser.add_argument("--chunk", type=int, default=256, help="tokens read at a time (256)")
    options = parser.parse_args()

    model, tokenizer = mlx_kvret.load("demo", backend="mlx")
    text = STORY.read_text(encoding="utf-8")
    facts = story(4096, seed=1).facts
    ids = tokenizer.encode(text)
    print(f"A story of {len(ids):,} tokens, a budget of {options.budget} tokens per KV head:\n")
    answers, costs = {}, {}
    for name, eviction in POLICIES.items():
        cache = mlx_kvret.make_cache(model, options.budget, **eviction)
        start = time.perf_counter()
        read(model, ids, cache, options.chunk)
        costs[name] = f"{cache.nbytes / 1e6:6.2f} MB of KV, read in {time.perf_counter() - start:.1f} s"
        answers[name] = [ask(model, tokenizer, fact, copy.deepcopy(cache)) for fact in facts]

    print("question          truth       " + "".join(f"{name:28}" for name in POLICIES))
    for row, (fact, value) in enumerate(facts.items()):
        said = [answers[name][row] for name in POLICIES]
        marked = [f"{'✓' if word == value else '✗'} {word}" for word in said]
        print(f"recall {fact:10} {value:12}" + "".join(f"{word:28}" for word in marked))
    print()
    for name in POLICIES:
        right = sum(a == b for a, b in zip(answers[name], facts.values(), strict=True))
        print(f"{name:28} {right:2} of {len(facts)} right   {costs[name]}")


def read(model, ids, cache, chunk) -> None:
    """Take in a text; what is due is evicted after every chunk."""
    import mlx.core as mx

    for start in range(0, len(ids), chunk):
        model(mx.array([ids[start : start + chunk]]), cache=cache)
        mx.eval([layer.state for layer in cache])


def ask(model, tokenizer, name, cache) -> str:
    """The first word of the answer to ``recall NAME``."""
    ids = tokenizer.encode(f"recall {name}", add_special_tokens=False)
    text = mlx_kvret.generate(model, tokenizer, ids, cache=cache, max_tokens=2)
    return (text.split() or ["–"])[0]


if __name__ == "__main__":
    main()
