"""Sliding windows in a step of fixed shapes: rings, in which a token's place is its position modulo W.

The stock layer joins arrays anew for every token. While steps are repeated rings stand in for these layers,
and whoever looks at the layers gets the newest tokens back into them first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin, DynamicSlidingWindowLayer

from mlx_kvret.errors import UnsupportedFeatureError

from .attention import dense_attend


class Ring(CacheLayerMixin):
    """The last W tokens of a layer, (R, H, W, D), in the order of their positions modulo W.

    A step that is broken off has written over a token that its successor does not see either.
    """

    is_sliding = True
    supports_early_init = False

    def __init__(self, stock: Any) -> None:
        super().__init__()
        self.stock, self.window = stock, stock.sliding_window
        held = stock.keys, stock.values
        shapes = [(*a.shape[:2], self.window, a.shape[3]) for a in held]
        # zeros, for what is not written yet is read, and then hidden
        self.wide_keys, self.wide_values = (a.new_zeros(shape) for a, shape in zip(held, shapes, strict=True))
        self._places = torch.arange(self.window, device=self.wide_keys.device)
        self.key: torch.Tensor | None = None
        self.attended = False
        self._slot = self._visible = self._places

    def begin(self, seen: torch.Tensor) -> None:
        """A step comes after ``seen`` tokens, (1,) on the device."""
        self._slot, self._visible = seen % self.window, (self._places <= seen)[None, None]

    def observe(self, x: torch.Tensor) -> None:
        """No gate looks at the layer."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the step's keys and values (R, H, 1, D), and give them back."""
        self.wide_keys.index_copy_(2, self._slot, key_states)
        self.wide_values.index_copy_(2, self._slot, value_states)
        self.key = key_states
        return key_states, value_states

    def attend(self, queries: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        """Attention of queries (R, Hq, 1, D) to what the window holds, (R, Hq, 1, Dv).

        Raises:
            UnsupportedFeatureError: the layer attends to another window, or in chunks.
        """
        if options.get("sliding_window") != self.window:
            raise UnsupportedFeatureError("a layer does not attend to its sliding window as such")
        self.attended = True
        scale, sinks = options.get("scaling"), options.get("s_aux")
        scale = queries.shape[-1] ** -0.5 if scale is None else scale
        rows, heads, _, _ = self.wide_keys.shape
        sinks = None if sinks is None else sinks.view(heads, -1).repeat(rows, 1)
        own = queries.reshape(rows * heads, -1, 1, queries.shape[-1])
        keys, values = self.wide_keys.flatten(0, 1), self.wide_values.flatten(0, 1)
        out = dense_attend(own, keys, values, self._visible, None, scale, sinks, options.get("softcap"))
        return out.view(rows, -1, 1, out.shape[-1])

    def load(self, seen: int) -> None:
        """Take in what the stock layer holds after ``seen`` tokens."""
        held = self.stock.keys.shape[2]
        slots = torch.arange(seen - held, seen, device=self.wide_keys.device) % self.window
        self.wide_keys.index_copy_(2, slots, self.stock.keys)
        self.wide_values.index_copy_(2, slots, self.stock.values)

    def replace(self) -> None:
        """The stock layer keeps nothing of its own."""
        held = self.stock.keys.shape[2]
        vars(self.stock).update(keys=self.wide_keys[:, :, :held], values=self.wide_values[:, :, :held])

    def put_back(self, seen: int) -> None:
        """Have the stock layer hold what it would hold after ``seen`` tokens."""
        held = min(seen, self.window - 1)
        slots = torch.arange(seen - held, seen, device=self.wide_keys.device) % self.window
        keys, values = self.wide_keys.index_select(2, slots), self.wide_values.index_select(2, slots)
        vars(self.stock).update(keys=keys, values=values, cumulative_length=seen)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to prepare."""

    def get_seq_length(self) -> int:
        raise UnsupportedFeatureError("the model counts its tokens on the host in every step")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_max_length(self) -> int:
        return self.window


class Rings:
    """The rings of a cache's sliding-window layers, which are ahead of these while steps are repeated."""

    def __init__(self, stock: Sequence[Any]) -> None:
        self.layers = [Ring(layer) for layer in stock]
        self.nbytes = sum(ring.wide_keys.nbytes + ring.wide_values.nbytes for ring in self.layers)

    @staticmethod
    def fit(stock: Sequence[Any]) -> bool:
        """Whether such layers can stand in rings now."""
        return all(
            type(layer) is DynamicSlidingWindowLayer
            and layer.is_initialized
            and not layer.record_past
            and layer.keys is not None
            and layer.keys.shape[2] < layer.sliding_window
            for layer in stock
        )

    def serve(self, stock: Sequence[Any]) -> bool:
        """Whether they stand in for just these layers."""
        return len(stock) == len(self.layers) and all(
            ring.stock is layer and len(ring.wide_keys) == len(layer.keys)
            for ring, layer in zip(self.layers, stock, strict=True)
        )

    def load(self, seen: int) -> None:
        """Take in what the layers hold; what is broken off has changed none of them."""
        for ring in self.layers:
            ring.load(seen)

    def replace(self) -> None:
        """From now on the layers hold nothing; done twice it comes to the same, as :meth:`put_back` does."""
        for ring in self.layers:
            ring.replace()

    def put_back(self, seen: int) -> None:
        for ring in self.layers:
            ring.put_back(seen)
