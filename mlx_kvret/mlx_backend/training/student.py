"""The frozen base model with hooks: one stock mlx-lm model is teacher and student.

As the teacher it attends fully. As the student every global attention layer decays its entries by the gates.
Nothing of the model is copied: :mod:`..hooks` hands attention to the entries of a training cache,
each block is recomputed for its gradient, and the stock head turns hidden states into logits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map

from ...core.config import EvictionConfig
from ...core.probing import agrees, distance
from ...core.types import Array, Ints
from ...errors import UnsupportedModelError
from ...training.packing import Batch, in_rows
from ...training.pictures import Inputs, places_of
from .. import hooks
from ..agreement import RoundedDifferently, as_array, tokens_of
from ..gates import RetentionGates
from ..vision import family, forgetful, logits_of, speaking
from .attention import PackedMask
from .blocks import recomputed
from .entries import Entry, entries_for, entries_in
from .pictures import Seeing

# far enough for a scale that grows with the position to show
_FAR = 1 << 17


@dataclass(frozen=True)
class Trace:
    """A forward pass: final hidden states (B, T, hidden), and log β of all heads (B, L·H, T) or None."""

    hidden: mx.array
    log_beta: mx.array | None


@dataclass(frozen=True)
class _Logits:
    """What a model says as it is (T, vocabulary), its type's rounding, and how far its own goes."""

    values: Array
    eps: float
    rounding: float

    def agree(self, found: Array) -> bool:
        return agrees(distance(found, self.values), self.eps, lambda: self.rounding)


class Student:
    """A hooked model, whose weights may be quantised.

    ``layers`` counts the layers that get gates; ``kv_heads`` and ``hidden_size`` are theirs; ``vocabulary``
    is the width of the logits, ``dtype`` their type. ``packs`` tells whether documents in one row are kept
    apart; layers with a recurrent state, say, run on through them, and positions that do more than rotate
    go on.

    Args:
        recompute: recompute each layer in the backward pass instead of keeping its activations.
        seeing: what makes inputs of pictures, for a model of mlx-vlm.

    Raises:
        UnsupportedModelError: the model's attention or head cannot be hooked without giving wrong results.
    """

    def __init__(self, model: nn.Module, recompute: bool = True, seeing: Seeing | None = None):
        model.eval()
        model.freeze()
        # of a model that sees the part that speaks is teacher and student
        self.model, self.seeing = speaking(model), seeing
        self._counts = hasattr(self.model, "get_rope_index")
        self._hidden: mx.array | None = None
        self._captured: mx.array | None = None
        self._hooked: list[nn.Module] = []
        made = hooks.install(model, None, {})
        try:
            self._layout, self._made = made.layout, made
            if made.layout.latent:
                raise UnsupportedModelError(
                    f"{_name(model)} attends to compressed keys, which training on MLX does not follow; use "
                    "another model"
                )
            ids = tokens_of(self.model, self._stock())
            half = ids.shape[1] // 2
            stock, second = (self._as_it_is(part) for part in (ids, ids[:, half:]))
            self._hook(_decoder(self.model), self._around_decoder)
            if recompute:
                for layer in self.model.layers:
                    self._hook(layer, _recomputed_layer)
            self._probe(ids, stock, second)
        except BaseException:
            self.detach()
            raise
        shape = made.layout.shape
        self.layers, self.kv_heads, self.hidden_size = shape.layers, shape.kv_heads, shape.hidden_size

    def detach(self) -> None:
        """Take every hook off the model again; its weights stay frozen."""
        for module in self._hooked:
            module.__class__ = type(module).__mro__[1]
        self._hooked = []
        hooks.remove(self.model)

    def see(self, ids: mx.array, starts: Ints, batch: Batch, rows: Sequence[int]) -> Inputs | None:
        """What the decoder is given for some rows of a batch, if there are pictures in them."""
        if not (shown := in_rows(batch, rows)):
            return None
        assert self.seeing is not None
        return self.seeing.inputs(ids, starts, shown)

    def teach(self, ids: mx.array, starts: Ints, seen: Inputs | None = None) -> Trace:
        """Full attention. Arguments as in :meth:`learn`."""
        return self._run(ids, starts, None, seen=seen)

    def learn(
        self,
        ids: mx.array,
        starts: Ints,
        gates: RetentionGates,
        sinks: int = 0,
        seen: Inputs | None = None,
    ) -> Trace:
        """Fading attention over packed documents, with a gradient for the gates.

        Args:
            ids: (B, T) tokens. ``starts`` (B, T): the place at which each token's document begins.
            sinks: first tokens of each document that do not fade.
            seen: what the decoder is given beside tokens, where there are pictures.
        """
        return self._run(ids, starts, gates, sinks, seen)

    def logits(self, hidden: mx.array) -> mx.array:
        """Final hidden states (N, hidden) to logits (N, vocabulary), by the model's own head."""
        self._hidden = hidden[None]
        try:
            return self._say(mx.zeros((1, len(hidden)), mx.int32))[0]
        finally:
            self._hidden = None

    def _cache(
        self,
        starts: Ints,
        gates: RetentionGates | None,
        offset: int = 0,
        sinks: int = 0,
        ends: Ints | None = None,
    ) -> list[Any]:
        stock = hooks.new_cache(self.model, self._made, EvictionConfig.create(policy="full"))
        mask = PackedMask(starts, ends=ends)
        return entries_for(stock, self._layout.places, mask, gates, offset, sinks)

    def _say(self, ids: mx.array, **given: Any) -> mx.array:
        """Logits of one call of the model, which keeps no positions of it."""
        with forgetful(self.model):
            return logits_of(self.model(ids, **given))

    def _run(
        self,
        ids: mx.array,
        starts: Ints,
        gates: RetentionGates | None,
        sinks: int = 0,
        seen: Inputs | None = None,
    ) -> Trace:
        cache = self._cache(starts, gates, sinks=sinks, ends=None if seen is None else seen.ends)
        hidden = self._decode(ids, cache, starts, seen)
        found = [entry.log_beta for entry in entries_in(cache) if entry.log_beta is not None]
        if gates is None:
            return Trace(hidden, None)
        return Trace(hidden, mx.stack(found, 1).swapaxes(2, 3).flatten(1, 2))

    def _decode(self, ids: mx.array, cache: list[Any], starts: Ints, seen: Inputs | None = None) -> mx.array:
        given = {} if seen is None else dict(seen.given)
        if "inputs_embeds" in given:
            # some models (Gemma 3) scale them in place
            given["inputs_embeds"] = mx.array(given["inputs_embeds"])
        if self._counts:
            # M-RoPE's positions begin anew with every document, and are not the cache's
            wide = np.broadcast_to(places_of(starts), (3, *starts.shape))
            given.setdefault("position_ids", mx.array(wide))
        else:
            given.pop("position_ids", None)
        # the head's logits are built but, MLX being lazy, never computed
        self._say(ids, cache=cache, **given)
        hidden, self._captured = self._captured, None
        assert hidden is not None
        return hidden

    def _hook(self, module: nn.Module, around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        cls = type(module)
        call = functools.wraps(cls.__call__)(around(cls.__call__))
        module.__class__ = type(cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__})
        self._hooked.append(module)

    def _around_decoder(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if self._hidden is not None:
                return self._hidden
            self._captured = stock(module, *args, **kwargs)
            return self._captured

        return call

    def _stock(self) -> list[Any]:
        """The model's own caches."""
        return list(hooks.new_cache(self.model, self._made, EvictionConfig.create(policy="full")))

    def _as_it_is(self, ids: mx.array) -> _Logits:
        """Logits of the model before it is hooked for training."""
        logits = self._say(ids)[0]
        values, eps, rounding = as_array(logits), float(mx.finfo(logits.dtype).eps), 0.0
        # float32 is never off by more than what is usual
        if eps > 1e-5:
            cache = self._layout.replaced(self._stock(), RoundedDifferently)
            rounding = distance(as_array(self._say(ids, cache=cache)[0]), values)
        self.vocabulary, self.dtype = logits.shape[-1], logits.dtype
        return _Logits(values, eps, rounding)

    def _probe(self, ids: mx.array, stock: _Logits, second: _Logits) -> None:
        """Run a few tokens through the hooks, and compare with the model as it is."""
        name, whole, half = _name(self.model), np.zeros(ids.shape, np.int64), ids.shape[1] // 2
        apart = np.where(np.arange(ids.shape[1]) < half, 0, half)[None]
        try:
            ours = self.logits(self.teach(ids, whole).hidden[0])
            packed = self.logits(self.teach(ids, apart).hidden[0, half:])
        except (TypeError, AttributeError, ValueError, IndexError) as error:
            reason = str(error).partition("\n")[0]
            raise UnsupportedModelError(
                f"{name} uses its cache in a way that training on MLX does not follow ({reason}); use "
                "another model"
            ) from error
        if not stock.agree(as_array(ours)):
            difference = distance(as_array(ours), stock.values)
            raise UnsupportedModelError(
                f"{name} gives other logits when hooked (by {difference:.1%}); use another model"
            )
        self.packs = second.agree(as_array(packed)) and self._only_rotates(ids, whole)

    def _only_rotates(self, ids: mx.array, starts: Ints) -> bool:
        """Whether far positions leave the lengths of queries and keys as they are, as RoPE does.

        Documents in a row have positions that go on, which is right only where differences alone count.
        """
        near, far = (self._lengths(ids, starts, offset) for offset in (0, _FAR))
        return bool(mx.all(mx.abs(near - far) <= 0.02 * near))

    def _lengths(self, ids: mx.array, starts: Ints, offset: int) -> mx.array:
        """Norms of all queries and keys of each entry, that begin at a position."""
        cache = self._cache(starts, None, offset)
        lengths: list[mx.array] = []

        def attend(entry: Entry, queries: mx.array, keys: mx.array, *rest: Any, **others: Any) -> mx.array:
            lengths.extend(mx.linalg.norm(x.astype(mx.float32).reshape(-1)) for x in (queries, keys))
            return Entry.attend(entry, queries, keys, *rest, **others)

        for entry in entries_in(cache):
            vars(entry)["attend"] = functools.partial(attend, entry)
        self._decode(ids, cache, starts)
        return mx.stack(lengths)


def _recomputed_layer(stock: Callable[..., Any]) -> Callable[..., Any]:
    """A layer's call that keeps only its inputs for the backward pass. What the gate says comes out too."""

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = (args, kwargs)
        entries = [entry for leaf in _leaves(given) for entry in entries_in(leaf)]
        gates = [part for entry in entries for part in entry.gate_modules()]
        outer = [part.trainable_parameters() for part in gates]
        # what a checkpoint is not given as an input gets no gradient
        arrays = [leaf for leaf in _leaves(given) if _differs(leaf)]

        def inner(weights: list[Any], arrays: list[mx.array]) -> list[Any]:
            rest = iter(arrays)
            args, kwargs = tree_map(lambda leaf: next(rest) if _differs(leaf) else leaf, given)
            _update(gates, weights)
            out = stock(module, *args, **kwargs)
            return [out, *(entry.log_beta for entry in entries if entry.log_beta is not None)]

        out, *said = recomputed(inner)(outer, arrays)
        _update(gates, outer)
        for entry, log_beta in zip((e for e in entries if e.log_beta is not None), said, strict=True):
            entry.log_beta = log_beta
        return out

    return call


def _update(modules: list[nn.Module], weights: list[Any]) -> None:
    for module, own in zip(modules, weights, strict=True):
        module.update(own)


def _leaves(tree: Any) -> list[Any]:
    found: Any = tree_flatten(tree)
    return [leaf for _, leaf in found]


def _differs(leaf: Any) -> bool:
    """Whether a gradient may flow through it."""
    return isinstance(leaf, mx.array) and mx.issubdtype(leaf.dtype, mx.floating)


def _decoder(model: nn.Module) -> nn.Module:
    """The part of a model below its head: what holds all the attention layers."""
    inner = hooks.language_model(model)
    for child in inner.children().values():
        if isinstance(child, nn.Module) and any(True for _ in hooks.attention_modules(child)):
            return child
    raise UnsupportedModelError(f"{_name(model)} has no decoder apart from its head; use another model")


def _name(model: nn.Module) -> str:
    return str(
        family(model) or getattr(model, "model_type", None) or type(model).__module__.rpartition(".")[2]
    )
