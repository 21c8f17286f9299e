"""Retention gates in torch: from a layer's attention input to log β of each KV head (arXiv 2605.09649)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from mlx_kvret.core.checkpoint import GateCheckpoint
from mlx_kvret.core.config import GateConfig
from mlx_kvret.core.tensors import Tensor
from mlx_kvret.core.types import Floats

_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}
_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


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
        own = None if config.shared_projection else last
        self.layers = nn.ModuleList(_maps(config, inner, own) for _ in range(config.layers))
        if config.shared_projection:
            self.shared = _maps(config, (), last)

    def log_beta(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        """Attention inputs ``x`` (..., hidden) of one layer to log β (..., kv_heads), float32, at most 0."""
        maps = self.layers[layer]
        head = self.shared if self.config.shared_projection else maps
        x = x.to(getattr(maps, self._inner[0]).weight.dtype)
        for name in self._inner:
            x = self._activation(getattr(maps, name)(x))
        return F.logsigmoid(getattr(head, self._last)(x).float() + head.bias.float())


def _maps(config: GateConfig, inner: Sequence[str], last: str | None) -> nn.Module:
    maps, rows = nn.Module(), config.hidden_size
    for name in inner:
        setattr(maps, name, nn.Linear(rows, config.width))
        rows = config.width
    if last:
        setattr(maps, last, nn.Linear(config.width, config.kv_heads, bias=False))
        maps.bias = nn.Parameter(torch.full((config.kv_heads,), float(config.bias_init)))
    return maps


def to_tensor(stored: Tensor) -> torch.Tensor:
    """A stored tensor as a torch tensor of the same type."""
    return torch.from_numpy(stored.float32()).to(_TYPES[stored.dtype])


def from_checkpoint(checkpoint: GateCheckpoint) -> RetentionGates:
    """Gates with a shared checkpoint's weights, in the types they are stored in, frozen."""
    gates = RetentionGates(checkpoint.config)
    tensors = {name: to_tensor(stored) for name, stored in checkpoint.tensors.items()}
    gates.load_state_dict(tensors, assign=True)
    return gates.requires_grad_(False)


def to_arrays(gates: RetentionGates) -> dict[str, Floats]:
    """The weights under their names in a shared checkpoint, as float32 arrays."""
    return {name: weight.detach().float().cpu().numpy() for name, weight in gates.state_dict().items()}
