"""The next tokens over ranks: one exchange for rows that choose alike, and no wait for one that is gone."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest

import mlx_kvret
from mlx_kvret.errors import RankLost
from mlx_kvret.serving.batched import Batched
from mlx_kvret.serving.drawing import Drawing
from mlx_kvret.serving.starting import backend_for

from .threads import Table, Thread

PROMPTS = [[5, 6, 7], [8, 9, 10], [11, 12, 13]]


class Alone(Thread):
    """One rank, which notes how many rows' tokens are exchanged at a time."""

    def __init__(self) -> None:
        super().__init__(0, Table(1))
        self.asked = list[int]()

    def token(self, token: Any) -> Any:
        self.asked.append(token.shape[0])
        return token


@pytest.mark.parametrize("backend", ["mlx", "torch"])
def test_likeliest_tokens_of_all_rows_go_together(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = mlx_kvret.load("demo", backend=backend)
    found = []
    for ranks in (None, Alone()):
        share = None if ranks is None else SimpleNamespace(ranks=ranks)
        sampling = importlib.import_module(f"{mlx_kvret.api.backend_of(model).__package__}.sampling")
        monkeypatch.setattr(sampling, "share_of", lambda model, share=share: share)
        texts = mlx_kvret.generate_batch(model, None, PROMPTS, budget=16, max_tokens=4)
        # and in a server
        served = backend_for(model, tokenizer, {"budget": 16})
        engine = Batched(served, 4)
        for prompt in PROMPTS:
            cache = served.new_cache(None)
            served.read(cache, prompt[:-1])
            engine.join(cache, prompt[-1], served.chooser(Drawing()))
        for _ in range(4):
            engine.step()
        engine.close()
        found.append(texts)
    assert found[0] == found[1]
    # 4 tokens of 3 rows, and the one more that is on its way when rows end
    assert len(ranks.asked) <= 12 and set(ranks.asked) == {3}


@pytest.mark.parametrize("batch", [False, True])
def test_a_token_that_cannot_come_is_told(batch: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, tokens = (
        importlib.import_module(f"mlx_kvret.cuda_backend.{name}") for name in ("cache", "tokens")
    )

    def lost(*given: Any) -> None:
        raise RuntimeError("NCCL: connection closed")

    model, _ = mlx_kvret.load("demo", backend="torch")
    monkeypatch.setattr(cache.BoundedCache, "share", object())
    monkeypatch.setattr(tokens.Told, "get", lost)
    with pytest.raises(RankLost, match="another rank is gone"):
        if batch:
            mlx_kvret.generate_batch(model, None, PROMPTS, budget=16, max_tokens=4)
        else:
            mlx_kvret.generate(model, None, PROMPTS[0], budget=16, max_tokens=4)
