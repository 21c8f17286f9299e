"""The scope "modality" over ranks, on the host and on both backends, chooses as one process does."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_kvret.core import ranks as host
from mlx_kvret.core.budget import CacheShape
from mlx_kvret.core.config import EvictionConfig
from mlx_kvret.core.eviction import own_quotas, protected
from mlx_kvret.core.eviction import select as alone
from mlx_kvret.core.pictures import Picture
from mlx_kvret.core.ranks import Ranks
from mlx_kvret.core.shares import Share
from mlx_kvret.cuda_backend import digits
from mlx_kvret.mlx_backend import selection

from .threads import together


def on_host(score: Any, position: Any, head: Any, share: Share, seen: int, config: Any, seen_as: Any) -> Any:
    marked, quota = own_quotas(seen_as, seen, config, share.whole.heads)
    must = protected(position, seen, config)
    flat = np.append(share.heads, share.whole.heads)[head]
    told = config.budget * share.whole.heads, seen, share.whole.heads, share.ranks
    keep = host.select_split(score, must, position, flat, marked[position], quota, *told)
    return keep if config.threshold is None else keep & (must | (score >= np.log(config.threshold)))


def on_mlx(score: Any, position: Any, head: Any, share: Share, seen: int, config: Any, seen_as: Any) -> Any:
    rows = [mx.array(a) for a in (score, position, head)]
    size = share.shape.heads
    return np.array(selection.select(*rows, seen, config, size, size, seen_as, share, np.ones(1, bool)))


def on_torch(score: Any, position: Any, head: Any, share: Share, seen: int, config: Any, seen_as: Any) -> Any:
    rows = [torch.from_numpy(a) for a in (score, position, head)]
    return digits.select(*rows, seen, config, share, np.ones(1, bool), seen_as).numpy()


@pytest.mark.parametrize("chosen", [on_host, on_mlx, on_torch])
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    size=st.integers(2, 3),
    share=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    threshold=st.booleans(),
    copies=st.booleans(),
)
def test_the_split_is_that_of_one_process(
    chosen: Any, seed: int, size: int, share: float, threshold: bool, copies: bool
) -> None:
    random = np.random.default_rng(seed)
    seen, layers, own_heads = int(random.integers(8, 40)), 2, 1 + seed % 2
    pictures = (Picture(2, 5, advance=3), Picture(6, seen - 1, advance=1))
    config = EvictionConfig.create(
        budget=3, buffer=1, policy="learned", scope="modality", picture_share=share, sinks=1, window=2,
        threshold=0.5 if threshold else None,
    )  # fmt: skip
    shape = CacheShape(layers, own_heads, 8, 8, 4, 32)
    whole = own_heads if copies else own_heads * size
    held = random.random((layers * whole, seen)) < 0.7
    held[:, :1] = held[:, -2:] = True
    head, position = (a.astype(np.int32) for a in np.nonzero(held))
    # copies are the first rank's, which selects as if it were alone
    if (copies and chosen is on_host) or len(head) < (config.budget + config.buffer) * layers * whole:
        return
    # few values, so that there are ties
    score = random.integers(-3, 1, len(head)).astype(np.float32)
    expected = alone(score, position, head, seen, config, layers, whole, pictures)

    def work(ranks: Ranks) -> Any:
        mine = Share.tensor(ranks, shape, latent=copies)
        here, local = mine.own(head)
        # a last place holds no entry
        given = score[here], position[here], local
        last = 0, 0, shape.heads
        rows = [np.append(a, fill).astype(a.dtype)[None] for a, fill in zip(given, last, strict=True)]
        keep = chosen(*rows, mine, seen, config, pictures)[0]
        assert not keep[-1]
        return here, keep[:-1]

    for here, keep in together(size, work):
        assert keep.tolist() == expected[here].tolist()
