"""What a model is given in a step of fixed shapes, in the place of its bounded cache: memory, no counting.

A step brings one token to each row. Where it goes is told by numbers on the device, so that the step can be
recorded once and repeated (:mod:`.recording`); the accounts are kept by who repeats it (:mod:`.step`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from mlx_kvret.errors import UnsupportedFeatureError

from . import layer as eager
from .reading import Reading
from .ring import Ring

# the cache of the step under way in this thread; compilers know thread-locals, but no context variables
_here = threading.local()


class FixedLayer(CacheLayerMixin):
    """A competing layer in a step of fixed shapes: takes in a token of each row and attends to all it has."""

    is_sliding = False
    supports_early_init = False

    def __init__(self, reading: Reading, layer: int) -> None:
        super().__init__()
        self.reading, self.layer = reading, layer
        self.key: torch.Tensor | None = None
        self.attended = False

    def begin(self, seen: torch.Tensor) -> None:
        """A step comes, whose numbers the reading has."""

    def observe(self, x: torch.Tensor) -> None:
        """Take in the layer's attention input (R, 1, hidden)."""
        self.reading.observe(self.layer, x)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the step's keys and values (R, H, 1, D), and give them back."""
        self.reading.append(self.layer, key_states, value_states)
        self.key = key_states
        return key_states, value_states

    def attend(self, queries: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        """Attention of queries (R, Hq, 1, D) over all that the layer holds, (R, Hq, 1, Dv)."""
        self.attended = True
        ((_, _, view),) = self.reading.views(self.layer)
        scale = options.get("scaling")
        scale = queries.shape[-1] ** -0.5 if scale is None else scale
        return eager.attend(queries, view, scale, options.get("s_aux"), options.get("softcap"))

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to prepare."""

    def get_seq_length(self) -> int:
        raise UnsupportedFeatureError("the model counts its tokens on the host in every step")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_max_length(self) -> int:
        return -1


class FixedCache(Cache):
    """The layers of a bounded cache in a step of fixed shapes, as transformers knows them.

    ``seen`` (R,) on the device are the tokens that each row has seen before the step.
    """

    def __init__(self, reading: Reading, layers: Sequence[FixedLayer | Ring]) -> None:
        super().__init__(layers=list(layers))
        assert reading.places is not None
        self.seen = reading.places.seen
        self._parts = list(layers)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self._parts[layer_idx].update(key_states, value_states)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """What masks begin with, which a step has none of."""
        return 0

    def observe(self, module: Any, x: torch.Tensor) -> None:
        """Take in the input (R, 1, hidden) of an attention module."""
        self._parts[module.layer_idx].observe(x)

    def owner_of(self, keys: torch.Tensor) -> Any:
        """The layer whose :meth:`update` returned exactly this tensor, or None; several may attend to it."""
        return next((layer for layer in self._parts if layer.key is keys), None)

    def run(self, forward: Callable[[], Any]) -> Any:
        """What ``forward()`` returns, with this as the cache of the step under way."""
        with _under_way(self):
            for layer in self._parts:
                layer.begin(self.seen[:1])
            out = forward()
        done = all(layer.attended for layer in self._parts)
        for layer in self._parts:
            layer.key, layer.attended = None, False
        if not done:
            raise UnsupportedFeatureError("not all layers of the model attend to what they cache")
        return out


def current() -> FixedCache | None:
    """The cache of the step of fixed shapes that is under way in this thread."""
    found: FixedCache | None = getattr(_here, "cache", None)
    return found


@contextmanager
def _under_way(cache: FixedCache | None) -> Iterator[None]:
    before, _here.cache = current(), cache
    try:
        yield
    finally:
        _here.cache = before
