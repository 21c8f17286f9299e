"""A forward pass under way: which rows read how many tokens, and where these are put until it is over."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any
from weakref import ref

import mlx.core as mx
import numpy as np

from ..core.state import State
from ..errors import UnsupportedFeatureError
from . import kernels
from .attention import attend, attend_rows
from .kernels.launch import rows as host_rows
from .kernels.prefill_attention import chunk_rows
from .observed import Observed
from .recent import Pair
from .view import Chunk, ChunkView, LayerView, placed

if TYPE_CHECKING:
    from .arena import Arena
    from .row import Row

# as many tokens of one row, drafts say, are written in place
FEW = 8


class Reading:
    """``rows`` read ``counts`` tokens each of the ``tokens`` that the model is given for every one of them.

    A row's clock stands still until :meth:`clocks`. Few tokens go to the recent windows, others to arrays of
    their own, ``wide``, by row and layer.
    """

    def __init__(self, arena: Arena, rows: list[Row], counts: list[int], tokens: int) -> None:
        self.arena, self.rows, self.counts, self.tokens = arena, rows, counts, tokens
        self.active = [(index, row, n) for index, (row, n) in enumerate(zip(rows, counts, strict=True)) if n]
        self.ends = [row.length + n for _, row, n in self.active]
        self.end = max(self.ends, default=0)
        layers = arena.shape.layers
        few = tokens == 1 or (len(rows) == 1 and tokens <= FEW)
        in_place = few and self.end <= max(1, arena.config.buffer)
        self.wide: list[list[Pair | None]] | None = (
            None if in_place else [[None] * layers for _ in self.active]
        )
        # of several rows: each layer's tokens one row after another
        self.chunks: list[Pair | None] = [None] * layers
        self.observed: Observed | None = None
        if arena.gates is not None and arena.config.policy == "learned":
            self.observed = Observed(layers, tokens, sum(counts))
            self._at_once = tokens > FEW or tokens >= arena.defer
        self.fetched: list[Pair | None] = [None] * layers
        self._views: list[LayerView | None] = [None] * layers
        # masks that were made for the pass, and by id of the keys whose they are
        self.masks: list[mx.array] = []
        # of these masks those that show more: tokens of one picture see each other
        self.shown: list[mx.array] = []
        self.fetchers: dict[int, Any] = {}
        self._slabs = [row.slab for _, row, _ in self.active]
        self._starts = [row.length for _, row, _ in self.active]
        self._places: tuple[mx.array, mx.array] | None = None
        self._bias: mx.array | None = None
        self._batch: mx.array | None = None
        self._offsets: dict[bool, mx.array] = {}

    # ------------------------------------------------------------------ what the layers bring

    def observe(self, layer: int, x: mx.array) -> None:
        """Take in a layer's attention input (R, T, hidden)."""
        if x.shape[0] != len(self.rows):
            raise UnsupportedFeatureError(
                f"a batch of {x.shape[0]} sequences does not work with a cache of {len(self.rows)}; make a "
                "cache for each, and generate with mlx_lm.batch_generate or mlx-lm's BatchGenerator"
            )
        if self.observed is None or not self.active:
            return
        if self.observed.count == x.shape[0] * x.shape[1]:
            flat = x.reshape(-1, x.shape[-1])
        else:
            flat = mx.concatenate([x[index, :n] for index, _, n in self.active])
        if self._at_once:
            self.observed.scores[layer] = self.arena.gate(layer, flat).T
        else:
            self.observed.inputs[layer] = flat

    def append(self, layer: int, keys: mx.array, values: mx.array) -> Pair:
        """Take in a layer's keys and values (R, H, T, D).

        Returns what attention is to be asked with: a single row's whole window (1, H, r, D), else what came.
        """
        recent, single = self.arena.recent, len(self.rows) == 1
        if not self.active:
            self.fetched[layer] = keys, values
            return keys, values
        if self.wide is None and len(self.active) == 1:
            index = self.active[0][0]
            new = (keys, values) if single else (keys[index : index + 1], values[index : index + 1])
            recent.append(layer, self._slabs[0], self._starts[0], *new)
        elif self.wide is None:
            new = self._chosen(keys), self._chosen(values)
            if self._abreast:
                first, last, start = self._slabs[0], self._slabs[-1] + 1, self._starts[0]
                recent.append_block(layer, slice(first, last), start, *new)
            else:
                recent.append_rows(layer, *self._where(), self.end, *new)
        else:
            joined = self._joined(layer, keys, values)
            self.chunks[layer] = joined
            for place, chunk in enumerate(self._chunks):
                own = slice(chunk.begin, chunk.begin + chunk.end)
                self.wide[place][layer] = joined[0][:, :, own], joined[1][:, :, own]
        self._views[layer] = None
        self.fetched[layer] = self.view(layer).pair if single else (keys, values)
        return self.fetched[layer]  # type: ignore[return-value]

    def newest_keys(self, layer: int) -> mx.array:
        """Keys of the layer that the pass has changed."""
        keys = self.arena.recent.keys[layer] if self.wide is None else self._wide(0, layer)[0]
        assert keys is not None
        return keys

    def put_newest_keys(self, layer: int, keys: mx.array) -> None:
        """Have these instead, which are the same and wait for something else."""
        if self.wide is None:
            self.arena.recent.keys[layer] = keys
        else:
            self.wide[0][layer] = keys, self._wide(0, layer)[1]
        self._views[layer] = None

    # ------------------------------------------------------------------ what the layers see

    def view(self, layer: int) -> LayerView:
        """What the rows that read attend to if their tokens are in the recent windows, or the only row."""
        found = self._views[layer]
        if found is None:
            found = self._views[layer] = self._view(layer)
        return found

    def _view(self, layer: int) -> LayerView:
        pool, recent, slabs = self.arena.pool, self.arena.recent, tuple(self._slabs)
        if self.wide is not None:
            return LayerView(pool, layer, *self._wide(0, layer), slabs[:1])
        whole = recent.whole(layer)
        if self._batch is None:
            self._batch = placed([(s, s, n) for s, n in zip(slabs, self.ends, strict=True)])
        where: dict[str, Any] = {"windows": whole, "batch": self._batch}
        if len(slabs) == 1:
            return LayerView(pool, layer, *recent.window(layer, slabs[0], self.end), slabs, **where)
        # gathered only if somebody looks at it
        pair = recent.windows(layer, self._slabs, self.end)
        if len(set(self.ends)) == 1:
            return LayerView(pool, layer, *pair, slabs, **where)
        if self._bias is None:
            real = mx.arange(self.end) < mx.array(self.ends)[:, None]
            self._bias = mx.where(real, 0.0, -mx.inf)[:, None, None]
        return LayerView(pool, layer, *pair, slabs, tuple(self.ends), self._bias, **where)

    def attend(
        self,
        layer: int,
        queries: mx.array,
        scale: float,
        causal: bool,
        sinks: mx.array | None = None,
    ) -> mx.array:
        """Attention (R, Hq, T, Dv) of ``queries`` (R, Hq, T, Dk); zeros for what is padding."""
        if not self.active:
            _, values = self.fetched[layer]  # type: ignore[misc]
            return mx.zeros((*queries.shape[:3], values.shape[3]), queries.dtype)
        if len(self.rows) == 1:
            return attend(queries, self.view(layer), scale, causal, sinks)
        if self.wide is None:
            out = attend(self._chosen(queries), self.view(layer), scale, causal, sinks)
            if len(self.active) == len(self.rows):
                return out
            spread = mx.zeros((len(self.rows), *out.shape[1:]), out.dtype)
            spread[mx.array([index for index, _, _ in self.active])] = out
            return spread
        joined = self.chunks[layer]
        assert joined is not None
        chunks = ChunkView(self.arena.pool, layer, *joined, self._chunks)
        return attend_rows(queries, chunks, scale, causal, sinks)

    def offsets(self, layer: int) -> mx.array:
        """Tokens that each row has seen (R,), those of the pass too once the layer has them."""
        came = self.fetched[layer] is not None
        if came not in self._offsets:
            seen = [row.seen + n * came for row, n in zip(self.rows, self.counts, strict=True)]
            self._offsets[came] = mx.array(seen, mx.int32)
        return self._offsets[came]

    # ------------------------------------------------------------------ its end

    def after(self) -> State:
        """The rows and the arena once the pass is over."""
        changed: list[tuple[Any, dict[str, Any]]] = []
        observed, first = self.observed, 0
        if observed is not None and self.active:
            changed.append((observed, observed.whole()))
            if observed.scores[0] is None:
                waiting = [one for one in self.arena.unscored if one() is not None]
                changed.append((self.arena, {"unscored": [*waiting, ref(observed)]}))
        for place, (_, row, n) in enumerate(self.active):
            row.tell_reach(n)
            after: dict[str, Any] = {"seen": row.seen + n, "length": row.length + n}
            if observed is not None:
                after["pieces"] = [*row.pieces, (observed, first, first + n)]
                first += n
            if self.wide is not None:
                after["wide"] = list(self.wide[place])
            changed.append((row, after))
        return State(changed)

    def before(self) -> Iterable[tuple[Any, dict[str, Any]]]:
        """What :meth:`after` and the layers change, as it is now."""
        arena = self.arena
        yield arena.recent, {"keys": list(arena.recent.keys), "values": list(arena.recent.values)}
        yield arena, {"unscored": arena.unscored}
        for _, row, _ in self.active:
            yield row, {"seen": row.seen, "length": row.length, "pieces": row.pieces, "wide": row.wide}

    # ------------------------------------------------------------------ places

    @functools.cached_property
    def _chunks(self) -> tuple[Chunk, ...]:
        begins = [0, *itertools.accumulate(self.ends)]
        return tuple(
            Chunk(index, row.slab, begin, end, n)
            for (index, row, n), begin, end in zip(self.active, begins, self.ends, strict=False)
        )

    def _joined(self, layer: int, keys: mx.array, values: mx.array) -> Pair:
        """Tokens of all rows that read, (1, H, n, D): each row's newest ones and then those that came."""

        def plain() -> Pair:
            sides: tuple[list[mx.array], list[mx.array]] = ([], [])
            for index, row, n in self.active:
                old = row.window(layer) if row.length else ()
                for side, array in zip(sides, old, strict=False):
                    side.append(array)
                for side, array in zip(sides, (keys, values), strict=True):
                    side.append(array[index : index + 1, :, :n])
            # copies, for a view would hold on to more than these tokens
            joined = [mx.contiguous(s[0]) if len(s) == 1 else mx.concatenate(s, axis=2) for s in sides]
            return joined[0], joined[1]

        alike = {keys.dtype, values.dtype} <= set(kernels.TYPES) and keys.dtype == values.dtype
        apart = any(row.wide is not None for _, row, _ in self.active)
        if len(self.active) == 1 or apart or not alike or not kernels.enabled():
            return plain()
        windows = self.arena.recent.whole(layer) if any(row.length for _, row, _ in self.active) else None
        if windows is not None and {a.dtype for a in windows} != {keys.dtype}:
            return plain()
        where = self._came
        return kernels.served(lambda: chunk_rows(keys, values, windows, where, sum(self.ends)), plain)

    @functools.cached_property
    def _came(self) -> mx.array:
        """Where each token of :meth:`_joined` stands, as :func:`chunk_rows` is told."""
        parts = []
        for index, row, n in self.active:
            parts += [(-1 - row.slab, place) for place in range(row.length)]
            parts += [(index, place) for place in range(n)]
        return host_rows(np.array(parts, np.int32))

    def _wide(self, place: int, layer: int) -> Pair:
        assert self.wide is not None
        pair = self.wide[place][layer]
        assert pair is not None
        return pair

    def _chosen(self, array: mx.array) -> mx.array:
        """The part of an array over rows that belongs to those that read."""
        if len(self.active) == len(self.rows):
            return array
        return array[mx.array([index for index, _, _ in self.active])]

    @property
    def _abreast(self) -> bool:
        first = self._slabs[0]
        return len(set(self._starts)) == 1 and self._slabs == list(range(first, first + len(self._slabs)))

    def _where(self) -> tuple[mx.array, mx.array]:
        if self._places is None:
            self._places = mx.array(self._slabs, mx.int32), mx.array(self._starts, mx.int32)
        return self._places
