"""A batch whose pass MLX fails at; Makefile runs what has MLX fail on purpose in a process of its own."""

import mlx.core as mx
import pytest
from test_batches import make
from tiny import gated

from mlx_kvret.errors import CacheError


def test_what_fails_in_flight_loses_the_batch_and_says_so():
    model = gated()
    batch = make(model, 9)
    batch.extend(make(model, 9))
    mlp = model.model.layers[0].mlp
    stock = type(mlp).__call__
    with pytest.MonkeyPatch.context() as patch:
        poison = mx.linalg.inv(mx.zeros((3, 3)), stream=mx.cpu).sum()
        patch.setattr(type(mlp), "__call__", lambda self, x: stock(self, x) + poison)
        with pytest.raises(RuntimeError, match="Inverse"):
            model(mx.array([[1], [2]]), cache=batch)
    for _ in range(2):
        with pytest.raises(CacheError, match="MLX failed"):
            model(mx.array([[1], [2]]), cache=batch)
        with pytest.raises(CacheError, match="MLX failed"):
            batch.row(1)
