"""The frozen base model with hooks: one stock transformers model is teacher and student.

As the teacher it attends fully. As the student every global attention layer decays its entries by the gates.
Nothing of the model is copied: a pre-hook on each attention module runs the gate, an attention function in
transformers' registry decays, and the stock head turns hidden states into logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from mlx_kvret.core.probing import agrees, distance
from mlx_kvret.core.types import Array
from mlx_kvret.errors import UnsupportedModelError
from mlx_kvret.training.packing import Batch, in_rows
from mlx_kvret.training.pictures import Inputs

from ..agreement import as_array, rounded_cache, tokens_of
from ..cache import cache_argument
from ..gates import RetentionGates
from ..modules import attention_modules, competing_layers
from .attention import PackedMask
from .pictures import Seeing
from .registry import CALL, IMPLEMENTATION, Call
from .sharding import Shards


@dataclass(frozen=True)
class Trace:
    """A forward pass: final hidden states (B, T, hidden), and log β of all heads (B, L·H, T) or None."""

    hidden: torch.Tensor
    log_beta: torch.Tensor | None


class Student:
    """A hooked model.

    ``layers`` counts the layers that get gates; ``kv_heads`` and ``hidden_size`` are theirs. ``packs`` tells
    whether documents in one row are kept apart; layers with a recurrent state, say, run on through them.

    Raises:
        UnsupportedModelError: the model's attention or head cannot be hooked without giving wrong results.
    """

    def __init__(self, model: PreTrainedModel, seeing: Seeing | None = None):
        self.model, self.seeing = model.eval().requires_grad_(False), seeing
        self.shards = Shards(model)
        self._active: RetentionGates | None = None
        self._documents: PackedMask | None = None
        self._lasting: torch.Tensor | None = None
        self._shapes: dict[int, tuple[int, int]] = {}
        self._collected: dict[int, torch.Tensor] | None = None
        # a vision tower keeps its own
        self._stock = model.get_decoder().config._attn_implementation
        modules = attention_modules(model)
        self._competing = [modules[index] for index in competing_layers(model) if index in modules]
        if not self._competing:
            raise UnsupportedModelError(
                f"{_name(model)} has no attention layer that caches every token and can be hooked, so there "
                "is nothing to evict; train gates for a model with global attention"
            )
        place = {id(module): layer for layer, module in enumerate(self._competing)}
        self.layers = len(self._competing)
        self._handles = [
            module.register_forward_pre_hook(partial(self._before, place.get(id(module))), with_kwargs=True)
            for module in modules.values()
        ]
        try:
            self._probe()
            self.shards.close()
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Take every hook off the model again."""
        for handle in self._handles:
            handle.remove()
        for module in self.model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.gradient_checkpointing = module.training = False
        self.model.get_decoder().set_attn_implementation(self._stock)

    def checkpoint_layers(self) -> None:
        """Recompute each layer in the backward pass instead of keeping its activations."""
        layers = [module for module in self.model.modules() if isinstance(module, GradientCheckpointingLayer)]
        if not layers:
            raise UnsupportedModelError(
                f"{_name(self.model)} cannot recompute its layers; train without gradient checkpointing, on "
                "shorter sequences"
            )
        for layer in layers:
            layer.gradient_checkpointing = True
            vars(layer)["_gradient_checkpointing_func"] = partial(
                checkpoint, use_reentrant=False, preserve_rng_state=False
            )
            # the flag of the layer alone: what is inside stays in evaluation mode, without dropout
            layer.training = True

    @property
    def kv_heads(self) -> int:
        return self._shapes[0][0]

    @property
    def hidden_size(self) -> int:
        return self._shapes[0][1]

    def see(
        self, ids: torch.Tensor, starts: torch.Tensor, batch: Batch, rows: Sequence[int]
    ) -> Inputs | None:
        """What the decoder is given for some rows of a batch, if there are pictures in them."""
        if not (shown := in_rows(batch, rows)):
            return None
        assert self.seeing is not None
        return self.seeing.inputs(ids, starts, shown)

    def teach(self, ids: torch.Tensor, starts: torch.Tensor, seen: Inputs | None = None) -> Trace:
        """Full attention, without a gradient. Arguments as in :meth:`learn`."""
        with torch.no_grad():
            return self._run(ids, starts, None, seen=seen)

    def learn(
        self,
        ids: torch.Tensor,
        starts: torch.Tensor,
        gates: RetentionGates,
        sinks: int = 0,
        seen: Inputs | None = None,
    ) -> Trace:
        """Fading attention over packed documents.

        The backward pass must come before the next forward pass, for layers may be recomputed in it.

        Args:
            ids: (B, T) tokens. ``starts`` (B, T): the place at which each token's document begins.
            sinks: first tokens of each document that do not fade.
            seen: what the decoder is given instead of tokens, where there are pictures.
        """
        return self._run(ids, starts, gates, sinks, seen)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Final hidden states (N, hidden) to logits (N, vocabulary), by the model's own head."""
        decoder = self.model.get_decoder()
        decoder.forward = lambda *_, **__: _Hidden(last_hidden_state=hidden[None])
        try:
            dummy = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
            return self.model(input_ids=dummy, use_cache=False).logits[0]
        finally:
            del decoder.forward

    def _run(
        self,
        ids: torch.Tensor,
        starts: torch.Tensor,
        gates: RetentionGates | None,
        sinks: int = 0,
        seen: Inputs | None = None,
    ) -> Trace:
        documents = PackedMask(starts, None if seen is None else seen.ends)
        self._active, self._documents, self._collected = gates, documents, {}
        position = torch.arange(ids.shape[1], device=ids.device) - starts
        self._lasting = (position < sinks)[..., None] if sinks else None
        given = {"input_ids": ids, "position_ids": position} if seen is None else seen.given
        out = self.model.get_decoder()(**given, use_cache=False)
        collected, self._collected = self._collected, None
        if gates is None:
            return Trace(out.last_hidden_state, None)
        log_beta = torch.stack([collected[layer] for layer in range(self.layers)], 1)
        return Trace(out.last_hidden_state, log_beta.transpose(2, 3).flatten(1, 2))

    def _before(self, layer: int | None, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if self._documents is None:
            return
        x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        vars(module)[CALL] = Call(partial(self._fade, layer, x), self._documents)

    def _fade(self, layer: int | None, x: torch.Tensor, kv_heads: int) -> torch.Tensor | None:
        """log β (B, T, H) for a competing layer of the student, else None."""
        if layer is None:
            return None
        self._shapes[layer] = (kv_heads, x.shape[-1])
        if self._active is None:
            return None
        log_beta = self._active.log_beta(layer, x)
        if self._lasting is not None:
            log_beta = log_beta.masked_fill(self._lasting, 0.0)
        # None while a layer is recomputed
        if self._collected is not None:
            self._collected[layer] = log_beta
        return log_beta

    def _probe(self) -> None:
        """Run a few tokens through the hooks, and compare with the model as it is."""
        name = _name(self.model)
        if not self.model._supports_attention_backend:
            raise UnsupportedModelError(
                f"{name} does not take its attention function from transformers' registry; use another model"
            )
        ids = tokens_of(self.model)
        half = ids.shape[1] // 2
        apart = torch.zeros_like(ids)
        apart[:, half:] = half
        places = competing_layers(self.model)

        def logits(part: torch.Tensor, cache: Any = None) -> Array:
            """Of the model as it is."""
            given = {"use_cache": False} if cache is None else cache_argument(self.model, cache)
            return as_array(self.model(input_ids=part, **given).logits[0])

        with torch.no_grad():
            stock, second = logits(ids), logits(ids[:, half:])
            # float32 is never off by more than what is usual
            low = torch.finfo(self.model.dtype).eps > 1e-5
            parts = (ids, stock), (ids[:, half:], second)
            rounding = [
                distance(logits(p, rounded_cache(self.model, places)), own) if low else 0 for p, own in parts
            ]
            self.model.get_decoder().set_attn_implementation(IMPLEMENTATION)
            ours = as_array(self.logits(self._run(ids, torch.zeros_like(ids), None).hidden[0]))
            packed = as_array(self.logits(self._run(ids, apart, None).hidden[0, half:]))
        if len(self._shapes) < self.layers:
            raise UnsupportedModelError(
                f"{name} computes attention without the function it was given; use another model"
            )
        if len(set(self._shapes.values())) != 1:
            raise UnsupportedModelError(
                f"{name} has global layers of different shapes (KV heads, input width): "
                f"{sorted(set(self._shapes.values()))}; gates need one shape, use another model"
            )
        eps, difference = torch.finfo(self.model.dtype).eps, distance(ours, stock)
        if not agrees(difference, eps, lambda: rounding[0]):
            raise UnsupportedModelError(
                f"{name} gives other logits when hooked (by {difference:.1%}); use another model"
            )
        self.packs = agrees(distance(packed, second), eps, lambda: rounding[1])


def _name(model: PreTrainedModel) -> str:
    return type(model).__name__


class _Hidden(BaseModelOutputWithPast):
    """A decoder's output without the fields that some heads pass on, such as router logits."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
