"""Work in blocks with bounded memory: MLX builds the whole graph first, and may run it in any order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten


def after(array: mx.array, done: mx.array | None) -> mx.array:
    """The array, not to be used before ``done`` is computed: so blocks come one by one."""
    return array if done is None else mx.depends([array], [done])[0]


def with_gradient(forward: Callable[..., Any], backward: Callable[..., Any]) -> Callable[..., Any]:
    """A function of arrays whose gradient is ``backward(inputs, output's gradient, output)``."""
    function: Any = mx.custom_function(forward)
    function.vjp(backward)
    made: Callable[..., mx.array] = function
    return made


def recomputed(function: Callable[[Any, list[mx.array]], Any]) -> Callable[[Any, list[mx.array]], Any]:
    """As ``mx.checkpoint``: only inputs are kept for the backward pass, here of trees of weights and arrays.

    Gradients of the arrays wait for those of the weights. ``mx.checkpoint`` lets the weights' lie until the
    whole backward pass is over, and with them what they are computed from, in every layer.
    """

    def call(weights: Any, arrays: list[mx.array]) -> Any:
        names, own = _flat(weights)
        structure: list[str] = []

        def flat(*inputs: mx.array) -> list[mx.array]:
            given = _tree(names, inputs[: len(own)])
            structure[:], out = _flat(function(given, list(inputs[len(own) :])))
            return out

        def backward(inputs: Any, gradients: Any, _: Any) -> list[mx.array]:
            wanted = _listed(gradients)
            kept = mx.depends(_listed(inputs), wanted)
            found = mx.vjp(flat, kept, wanted)[1]
            of_weights, of_arrays = found[: len(own)], found[len(own) :]
            return [*of_weights, *(mx.depends(of_arrays, of_weights) if of_weights else of_arrays)]

        out: Any = with_gradient(flat, backward)(*own, *arrays)
        return _tree(structure, out)

    return call


def _listed(arrays: Any) -> list[mx.array]:
    """MLX gives a function of one array that array, not a tuple of one."""
    return [arrays] if isinstance(arrays, mx.array) else list(arrays)


def _flat(tree: Any) -> tuple[list[str], list[mx.array]]:
    entries: Any = tree_flatten(tree)
    return [name for name, _ in entries], [array for _, array in entries]


def _tree(names: list[str], arrays: Any) -> Any:
    return tree_unflatten(list(zip(names, arrays, strict=True)))
