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
CODES = {dtype: name for name, dtype in _TYPES.items()}


class RetentionGates(nn.Module):
    """The gates of all layers. Parameter names are those of the shared checkpoint.

    ``rg10``: ``log β = logsigmoid(W3·act(W2·act(W1·x + b1) + b2) + bias)``; ``rg`` lacks the middle one.
    ``stacked`` are the layers that :meth:`log_betas` serves.
    """

    stacked: tuple[int, ...] = ()

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

    @torch.no_grad()
    def stack(self, layers: Sequence[int]) -> None:
        """Lay the weights of layers side by side for :meth:`log_betas`; their own become views of them."""
        names = [name for name, _ in self.layers[layers[0]].named_parameters()]
        owned = {name: [self.layers[i].get_parameter(name) for i in layers] for name in names}
        self._stacks = {}
        for name, weights in owned.items():
            self._stacks[name] = torch.stack(tuple(weights))
            for weight, row in zip(weights, self._stacks[name], strict=True):
                weight.data = row
        self.stacked = tuple(layers)

    def log_betas(self, x: torch.Tensor) -> torch.Tensor:
        """As :meth:`log_beta` for all stacked layers in batched products: ``x`` (layers, ..., hidden)."""
        stacks, shape = self._stacks, x.shape[:-1]
        x = x.reshape(len(x), -1, x.shape[-1]).to(stacks[f"{self._inner[0]}.weight"].dtype)
        for name in self._inner:
            bias, weight = stacks[f"{name}.bias"], stacks[f"{name}.weight"]
            x = self._activation(torch.baddbmm(bias[:, None], x, weight.mT))
        if self.config.shared_projection:
            logits, bias = getattr(self.shared, self._last)(x), self.shared.get_parameter("bias")
        else:
            logits, bias = x @ stacks[f"{self._last}.weight"].mT, stacks["bias"][:, None]
        return F.logsigmoid(logits.float() + bias.float()).view(*shape, -1)


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
    """Gates with a shared checkpoint's weights, frozen, in the type of :meth:`GateCheckpoint.uniform`."""
    gates = RetentionGates(checkpoint.config)
    tensors = {name: to_tensor(stored) for name, stored in checkpoint.uniform().items()}
    gates.load_state_dict(tensors, assign=True)
    return gates.requires_grad_(False)


def to_arrays(gates: RetentionGates) -> dict[str, Floats]:
    """The weights under their names in a shared checkpoint, as float32 arrays."""
    return {name: weight.detach().float().cpu().numpy() for name, weight in gates.state_dict().items()}
