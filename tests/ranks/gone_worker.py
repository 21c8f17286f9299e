"""A process whose second rank hangs or dies while they answer: gone_worker.py BACKEND HOW FOLDER."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import mlx_kvret
from ranks import cases


def model_of(backend: str, folder: Path) -> tuple[Any, int]:
    """A tiny model that two processes hold, and which of them this is."""
    if backend == "mlx":
        import mlx.core as mx

        from ranks import mlx_worker

        group = mx.distributed.init(strict=True)
        return mlx_worker.model_of("heads", group), group.rank()
    from cuda import tiny

    model, _ = mlx_kvret.load(folder / "model", None, backend="torch", parallel="tensor")
    gates = tiny.checkpoint(model, model.config.num_hidden_layers)
    return mlx_kvret.attach(model, gates), int(os.environ["RANK"])


def main(backend: str, how: str, folder: Path) -> None:
    model, rank = model_of(backend, folder)
    left = 5
    if rank:
        # the other one is to look at its watch first
        os.environ["MLX_KVRET_RANK_TIMEOUT"] = "15"

    def processor(tokens: Any, logits: Any) -> Any:
        nonlocal left
        left -= 1
        if rank and not left:
            time.sleep(40) if how == "hangs" else os._exit(3)
        return logits

    cache = mlx_kvret.make_cache(model, **cases.SIZES)
    text = cases.TEXT[:30]
    mlx_kvret.generate(model, None, text, cache=cache, max_tokens=40, logits_processors=[processor])
    mlx_kvret.save_cache(model, cache, folder / "made.kv")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
