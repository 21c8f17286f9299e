"""Caches handed from thread to thread: made in one, read in another, copied, saved and loaded in others.

    python benchmarks/reliability/threads.py [--rounds 40]

After every handover the logits must be those of the same steps in one thread, on both backends.
"""

from __future__ import annotations

import argparse
import copy
import random
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

import mlx_kvret

T = TypeVar("T")


def elsewhere(work: Callable[[], T]) -> T:
    """The result of ``work`` in a new thread."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append((True, work()))
        except BaseException as error:  # an error belongs to whoever waits
            found.append((False, error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    good, result = found[0]
    if not good:
        raise result
    return result


def here(work: Callable[[], T]) -> T:
    return work()


def logits(backend: str, model: Any, cache: Any, ids: list[int]) -> np.ndarray:
    if backend == "mlx":
        import mlx.core as mx

        return np.array(model(mx.array([ids]), cache=cache)[0, -1].astype(mx.float32))
    import torch

    with torch.no_grad():
        return model(torch.tensor([ids]), past_key_values=cache).logits[0, -1].float().numpy()


def steps(
    backend: str, model: Any, seed: int, folder: Path, carry: Callable[[Callable[[], Any]], Any]
) -> Any:
    """Random steps on one cache, each carried out by ``carry``; returns the logits after each pass."""
    rng, told = random.Random(seed), []
    budget, buffer = rng.choice([4, 16, 64]), rng.choice([1, 4, 9])
    path = folder / f"{backend}.safetensors"
    cache = carry(lambda: mlx_kvret.make_cache(model, budget, buffer=buffer))
    for _ in range(8):
        ids = [rng.randrange(1, 60) for _ in range(rng.choice([1, 1, 5, 30]))]
        told.append(carry(lambda cache=cache, ids=ids: logits(backend, model, cache, ids)))
        act = rng.choice(["copy", "save", "look", "none"])
        if act == "copy" and backend == "mlx":
            cache = carry(lambda cache=cache: copy.deepcopy(cache))
        elif act == "save":
            carry(lambda cache=cache: mlx_kvret.save_cache(model, cache, path))
            cache = carry(lambda: mlx_kvret.load_cache(model, path)[0])
        elif act == "look":
            carry(lambda cache=cache: (cache.entries, cache.kept_positions(), cache.nbytes))
    return told


def measured(rounds: int) -> dict[str, tuple[int, list[str]]]:
    """Handovers by backend, and what went wrong in them."""
    told = {}
    for backend in ("mlx", "torch"):
        model, _ = mlx_kvret.load("demo", backend=backend)  # type: ignore[arg-type]
        faults: list[str] = []
        handovers = 0

        def carry(work: Callable[[], T]) -> T:
            nonlocal handovers
            handovers += 1
            return elsewhere(work)

        with tempfile.TemporaryDirectory() as folder:
            for seed in range(rounds):
                expected = steps(backend, model, seed, Path(folder), here)
                try:
                    found = steps(backend, model, seed, Path(folder), carry)
                    if not all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True)):
                        faults.append(f"round {seed}: other logits")
                except Exception as error:
                    faults.append(f"round {seed}: {type(error).__name__}: {error}")
        told[backend] = handovers, faults
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    for backend, (handovers, faults) in measured(parser.parse_args().rounds).items():
        print(f"{backend}: {handovers} handovers between threads, {len(faults)} faults")
        for fault in faults[:5]:
            print(f"    {fault}")


if __name__ == "__main__":
    main()
