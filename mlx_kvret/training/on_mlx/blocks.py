"""Work in blocks with bounded memory: MLX builds the whole graph first, and may run it in any order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx


def after(array: mx.array, done: mx.array | None) -> mx.array:
    """The array, not to be used before ``done`` is computed: so blocks come one by one."""
    return array if done is None else mx.depends([array], [done])[0]


def with_gradient(forward: Callable[..., mx.array], backward: Callable[..., Any]) -> Callable[..., mx.array]:
    """A function of arrays whose gradient is ``backward(inputs, output's gradient, output)``."""
    function: Any = mx.custom_function(forward)
    function.vjp(backward)
    made: Callable[..., mx.array] = function
    return made
