"""A real model on real prose within a fixed memory: ``python examples/real_demo.py``.

SmolLM2-135M-Instruct (``mlx-kvret get smollm2``) reads the beginning of Jane Austen's *Persuasion* in chunks,
with a few notes put between its paragraphs, and is asked for them at the end: with the full cache, with
learned eviction, and with attention sinks and a window.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path

import mlx_kvret
from mlx_kvret.errors import ConfigError

TEXT = Path(__file__).with_name("persuasion.txt")
# what is put into the text, what is asked, and what the answer must name
NOTES = (
    ("Please remember: the password of the harbour master is marmalade.",
     "What is the password of the harbour master?", "marmalade"),
    ("Please remember: Captain Brown keeps his money in a green teapot.",
     "Where does Captain Brown keep his money?", "teapot"),
    ("Please remember: the next ship to Lisbon leaves on Thursday.",
     "When does the next ship to Lisbon leave?", "Thursday"),
)  # fmt: skip
WAYS = {
    "full cache": {"policy": "full"},
    "learned": {},
    "sinks + window": {"policy": "recent"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2", help="a model with a chat template (smollm2)")
    parser.add_argument("--gates", default="auto", help="retention gates (auto: those known for the model)")
    parser.add_argument("--budget", type=int, default=256, help="tokens per KV head (256)")
    parser.add_argument("--chunk", type=int, default=128, help="tokens read at a time (128)")
    parser.add_argument("--backend", default="auto", choices=["auto", "mlx", "cuda", "torch"])
    options = parser.parse_args()

    model, tokenizer = mlx_kvret.load(options.model, options.gates, backend=options.backend)
    beginning = text_with_notes(tokenizer)
    count = len(tokenizer.encode(beginning, add_special_tokens=False))
    print(f"{count:,} tokens of prose, a budget of {options.budget} tokens per KV head\n")
    for name, eviction in WAYS.items():
        try:
            cache = mlx_kvret.make_cache(model, options.budget, **eviction)
        except ConfigError as error:
            print(f"{name}: {error}\n")
            continue
        start = time.perf_counter()
        read(model, tokenizer, beginning, cache, options.chunk)
        print(f"{name}: {cache.nbytes / 1e6:.1f} MB of KV, read in {time.perf_counter() - start:.1f} s")
        for _, question, wanted in NOTES:
            said = answer(model, tokenizer, question, copy.deepcopy(cache))
            print(f"  {'✓' if wanted.lower() in said.lower() else '✗'} {question}  {said}")
        print()


def text_with_notes(tokenizer) -> str:
    """The user's first turn as the chat template writes it, up to where the question will stand."""
    paragraphs = TEXT.read_text(encoding="utf-8").strip().split("\n\n")
    step = len(paragraphs) // (len(NOTES) + 1)
    for place, (note, _, _) in reversed(list(enumerate(NOTES, 1))):
        paragraphs.insert(place * step, note)
    turn = [{"role": "user", "content": "\n\n".join(paragraphs) + "\n\n"}]
    whole = tokenizer.apply_chat_template(turn, tokenize=False)
    return whole[: whole.rindex(paragraphs[-1]) + len(paragraphs[-1])] + "\n\n"


def read(model, tokenizer, text, cache, chunk) -> None:
    """Take in a text; what is due is evicted after every chunk, before anything is asked."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    last = mlx_kvret.stream_generate(
        model, tokenizer, ids, cache=cache, max_tokens=1, prefill_step_size=chunk
    )
    for _ in last:
        pass


def answer(model, tokenizer, question, cache) -> str:
    """What the model says to a question at the end of the turn that is in the cache."""
    mark = "\0"
    turn = [{"role": "user", "content": mark}]
    end = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True).split(mark)[1]
    ids = tokenizer.encode(question + end, add_special_tokens=False)
    return " ".join(mlx_kvret.generate(model, tokenizer, ids, cache=cache, max_tokens=32).split())


if __name__ == "__main__":
    main()
