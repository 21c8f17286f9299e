"""mlx-lm's batch contract on the entries of bounded layers: rows come, go and part without copying.

mlx-lm asks every layer's entry in turn, the first one first. What all layers share is done then, and found by
the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import ref

import mlx_lm.models.cache as mlx_cache

from ..errors import UnsupportedFeatureError
from .bounded import Bounded


class Batched(mlx_cache._BaseCache):
    """What a layer's entry has beside being a cache: :meth:`merge` if it is single, else all others."""

    shared: Bounded
    layer: int
    padded: bool

    def on(self, shared: Bounded) -> Batched:
        """The same layer's entry on other rows."""
        raise NotImplementedError

    def merge(self, caches: Sequence[Batched]) -> Batched:
        """A batch of copies of single sequences, each with any history or none."""
        parts = [cache.shared for cache in caches]
        return self.on(self._once("merge", lambda: Bounded.merged(parts)))

    def extract(self, index: int) -> Batched:
        """A single sequence that goes on where a row is, and that later passes of the batch do not touch."""
        return self.on(self._once(int(index), lambda: self.shared.extract(int(index))))

    def extend(self, other: Batched) -> None:
        """The rows of another batch come after these."""
        if self.layer == 0:
            self.shared.extend(other.shared)

    def filter(self, keep: Sequence[int]) -> None:
        """Keep these rows, in this order."""
        if self.layer == 0:
            self.shared.filter(keep)

    def prepare(
        self,
        *,
        lengths: Sequence[int] | None = None,
        left_padding: Sequence[int] | None = None,
        right_padding: Sequence[int] | None = None,
    ) -> None:
        """The passes to come have so many real tokens of each row, and padding after them."""
        if left_padding is not None and max(left_padding) > 0:
            raise UnsupportedFeatureError(
                "left padding does not work with a bounded cache; pad on the right, as mlx-lm 0.32 does"
            )
        if self.layer == 0 and lengths is not None:
            self.shared.expect([int(length) for length in lengths])

    def finalize(self) -> None:
        """Passes have no padding any more."""
        if self.layer == 0:
            self.shared.expect(None)

    def _once(self, key: Any, make: Any) -> Bounded:
        """What the first layer makes, which holds it while the others ask."""
        if self.layer == 0:
            made: Bounded = make()
            self.shared.made = key, ref(made)
            return made
        known, found = self.shared.made
        made_before = found()
        if known != key or made_before is None:
            raise UnsupportedFeatureError("a bounded layer is not batched on its own; ask all layers in turn")
        return made_before
