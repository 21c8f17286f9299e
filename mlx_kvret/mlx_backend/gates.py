"""Retention gates in MLX: from a layer's attention input to log β of each KV head (arXiv 2605.09649)."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np

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
        logit = head[self._last](x).astype(mx.float32) + head.bias.astype(mx.float32)
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
