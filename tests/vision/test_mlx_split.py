"""The fixed split between text and pictures on MLX, against the reference of core."""

import mlx.core as mx
import numpy as np
from hypothesis import given, settings

from mlx_kvret.core.eviction import due_groups
from mlx_kvret.core.eviction import select as reference
from mlx_kvret.mlx_backend.selection import select

from .test_pictures import cases


@settings(max_examples=60, deadline=None)
@given(cases())
def test_the_same_entries_stay(case):
    entries, seen, config, layers, kv_heads, pictures = case
    heads = layers * kv_heads
    score, position, head = np.array(entries, np.float32).reshape(-1, 3).T
    position, head = position.astype(np.int32), head.astype(np.int32)
    if not due_groups(np.bincount(head, minlength=heads), config, layers, kv_heads).all():
        return
    expected = reference(score, position, head, seen, config, layers, kv_heads, pictures)
    # free slots stand among the candidates
    padded = [
        mx.array(np.concatenate([[fill], a])[None]) for a, fill in ((score, 9), (position, 0), (head, heads))
    ]
    padded[1], padded[2] = padded[1].astype(mx.int32), padded[2].astype(mx.int32)
    found = select(padded[0].astype(mx.float32), *padded[1:], seen, config, heads, heads, pictures)
    assert np.array(found)[0, 1:].tolist() == expected.tolist() and not found[0, 0].item()
