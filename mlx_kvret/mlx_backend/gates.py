"""Retention gates in MLX: from a layer's attention input to log β of each KV head (arXiv 2605.09649)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from ..core.checkpoint import GateCheckpoint
from ..core.config import GateConfig
from ..core.tensors import Tensor

_ACTIVATIONS: dict[str, Callable[[mx.array], mx.array]] = {
    "silu": nn.silu,
    "gelu": nn.gelu,
    "gelu_pytorch_tanh": nn.gelu_approx,
    "relu": nn.relu,
}
_VIEWS = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16, "U32": mx.uint32}
CODES = {mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16", mx.uint32: "U32", mx.int32: "I32"}
DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


class RetentionGates(nn.Module):
    """The gates of all layers. Parameter names are those of the shared checkpoint.

    ``rg10``: ``log β = logsigmoid(W3·act(W2·act(W1·x + b1) + b2) + bias)``; ``rg`` lacks the middle one.
    """

    def __init__(self, config: GateConfig):
        super().__init__()
        self.config = config
        *inner, last = config.projections
        self._inner, self._last = inner, last
        self._activation = _ACTIVATIONS[config.activation]
        self.layers = [
            self._layer(inner, () if config.shared_projection else last) for _ in range(config.layers)
        ]
        if config.shared_projection:
            self.shared = self._layer((), last)
        self._stacks: dict[str, mx.array] = {}
        self._stacked: tuple[tuple[int, ...], list[mx.array]] = (), []

    def _layer(self, inner: list[str] | tuple[str, ...], last: str | tuple[()]) -> nn.Module:
        config, layer, rows = self.config, nn.Module(), self.config.hidden_size
        for name in inner:
            layer[name] = nn.Linear(rows, config.width)
            rows = config.width
        if last:
            layer[last] = nn.Linear(config.width, config.kv_heads, bias=False)
            layer.bias = mx.full((config.kv_heads,), config.bias_init)
        return layer

    def log_beta(self, layer: int, x: mx.array) -> mx.array:
        """Attention inputs ``x`` (..., hidden) of one layer to log β (..., kv_heads), float32, at most 0."""
        maps = self.layers[layer]
        head = self.shared if self.config.shared_projection else maps
        # quantised maps compute in the type of their scales
        x = x.astype(maps[self._inner[0]].bias.dtype)
        for name in self._inner:
            x = self._activation(maps[name](x))
        return _log_sigmoid(head[self._last](x).astype(mx.float32) + head.bias.astype(mx.float32))

    def stack(self, layers: Sequence[int]) -> None:
        """Lay the weights of layers side by side for :meth:`log_betas`; their own become views of them."""
        self._unstack()
        own = [self.layers[layer] for layer in layers]
        maps_of = [*self._inner, *(() if self.config.shared_projection else (self._last,))]
        # quantised ones have another product
        if not all(type(maps[name]) is nn.Linear for maps in own for name in maps_of):
            return
        names = [name for name, _ in _flat(own[0])]
        self._stacks = {name: mx.stack([dict(_flat(maps))[name] for maps in own]) for name in names}
        mx.eval(self._stacks)
        for place, maps in enumerate(own):
            # a slice is a view, an element would be a copy
            views = ((name, stack[place : place + 1].squeeze(0)) for name, stack in self._stacks.items())
            maps.load_weights(list(views))
        mx.eval([maps.parameters() for maps in own])
        self._stacked = tuple(layers), [array for maps in own for _, array in _flat(maps)]

    @property
    def stacked(self) -> tuple[int, ...]:
        """The layers that :meth:`log_betas` serves: none once somebody has given them other weights."""
        layers, known = self._stacked
        now = (array for layer in layers for _, array in _flat(self.layers[layer]))
        if not all(a is b for a, b in zip(known, now, strict=False)):
            self._unstack()
        return self._stacked[0]

    def _unstack(self) -> None:
        """Hold the weights of no layers any longer but where the layers themselves do."""
        self._stacks, self._stacked = {}, ((), [])

    def log_betas(self, x: mx.array) -> mx.array:
        """As :meth:`log_beta` for all stacked layers in batched products: ``x`` (layers, N, hidden)."""
        stacks = self._stacks
        x = x.astype(stacks[f"{self._inner[0]}.bias"].dtype)
        for name in self._inner:
            weight, bias = stacks[f"{name}.weight"], stacks[f"{name}.bias"]
            x = self._activation(mx.addmm(bias[:, None], x, weight.swapaxes(1, 2)))
        if self.config.shared_projection:
            logit, bias = self.shared[self._last](x), self.shared.bias
        else:
            logit, bias = x @ stacks[f"{self._last}.weight"].swapaxes(1, 2), stacks["bias"][:, None]
        return _log_sigmoid(logit.astype(mx.float32) + bias.astype(mx.float32))


def _flat(maps: nn.Module) -> list[tuple[str, mx.array]]:
    flat: Any = tree_flatten(maps.parameters())
    return flat


def _log_sigmoid(logit: mx.array) -> mx.array:
    return mx.minimum(logit, 0) - mx.log1p(mx.exp(-mx.abs(logit)))


def to_array(tensor: Tensor) -> mx.array:
    """A stored tensor as an MLX array of the same type."""
    array = mx.array(tensor.bits)
    return array.view(mx.bfloat16) if tensor.dtype == "BF16" else array.astype(_VIEWS[tensor.dtype])


def to_tensor(array: mx.array) -> Tensor:
    """An MLX array as a tensor to be stored, of the same type."""
    bits = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
    return Tensor(CODES[array.dtype], np.array(bits))


def from_checkpoint(checkpoint: GateCheckpoint) -> RetentionGates:
    """Gates with a shared checkpoint's weights, in the type of :meth:`GateCheckpoint.uniform`."""
    gates = RetentionGates(checkpoint.config)
    gates.load_weights([(name, to_array(tensor)) for name, tensor in checkpoint.uniform().items()])
    gates.freeze()
    return gates
