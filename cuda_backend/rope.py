"""RoPE whose frequencies depend on the length of the text, fixed to one length while a model is attached.

transformers chooses the frequencies of ``longrope`` and ``dynamic`` anew in every forward pass, while cached
keys keep the ones they were rotated with; and some models drop a cache when they change.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mlx_kvret.core.rope import Rope
from mlx_kvret.errors import ConfigError, UnsupportedModelError

from .cache import BoundedCache

# the frequencies of one position must not depend on others that are in the same pass
_NEAR, _FAR = 3, 1_000_003
_PREPARE = "prepare_inputs_for_generation"


@dataclass
class Fixed:
    """What was changed on a model: attributes of its modules; ``length`` is None if nothing depends on it."""

    length: int | None = None
    before: list[tuple[nn.Module, str, Any]] = field(default_factory=list)

    @property
    def mark(self) -> str:
        """What tells apart caches whose frequencies are fixed to a length; empty for all others."""
        return "" if self.length is None else f" rope_length={self.length}"

    def change(self, module: nn.Module, name: str, value: Any) -> None:
        """Set an attribute until :meth:`restore`."""
        self.before.append((module, name, getattr(module, name)))
        setattr(module, name, value)

    def restore(self, model: PreTrainedModel) -> None:
        """Give the model its own ways back."""
        while self.before:
            module, name, value = self.before.pop()
            setattr(module, name, value)
        vars(model).pop(_PREPARE, None)


def fix(model: PreTrainedModel, length: int | None = None) -> Fixed:
    """Fix a model's frequencies to ``length`` tokens in all, by default its full length.

    Raises:
        UnsupportedModelError: there is no default length, or frequencies that change nevertheless.
        ConfigError: a length that is none, or for a model to which it means nothing.
    """
    fixed = Fixed()
    try:
        rotary = list(_rotary(model))
        for module, kind, rope in rotary:
            if rope.depends_on_length:
                fixed.length = rope.fixed_length(length)
                _fix(module, kind, rope, fixed)
        if length is not None and fixed.length is None:
            raise ConfigError(f"rope_length has no effect on this {model.config.model_type} model; drop it")
        for module, kind, rope in rotary:
            _check(module, kind, rope)
    except BaseException:
        fixed.restore(model)
        raise
    if getattr(type(model), _PREPARE) is not getattr(GenerationMixin, _PREPARE):
        prepare: Any = partial(_prepare, model)
        # transformers reads the names of its arguments
        prepare.__wrapped__ = getattr(type(model), _PREPARE)
        vars(model)[_PREPARE] = prepare
    return fixed


def _rotary(model: PreTrainedModel) -> Iterator[tuple[nn.Module, str | None, Rope]]:
    """The decoder's rotating modules, once for each kind of layer they serve, and what they should do."""
    for module in model.get_decoder().modules():
        kinds = getattr(module, "rope_type", None)
        config: Any = getattr(module, "config", None)
        if kinds is None or not isinstance(getattr(config, "rope_parameters", None), dict):
            continue
        for kind in kinds if isinstance(kinds, dict) else (None,):
            settings = config.rope_parameters if kind is None else config.rope_parameters[kind]
            width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            yield module, kind, Rope(config.model_type, settings, width, config.max_position_embeddings)


def _fix(module: Any, kind: str | None, rope: Rope, fixed: Fixed) -> None:
    name = "inv_freq" if kind is None else f"{kind}_inv_freq"
    stock, layer = getattr(module, name), {} if kind is None else {"layer_type": kind}
    made, _ = ROPE_INIT_FUNCTIONS[rope.kind](module.config, stock.device, seq_len=fixed.length, **layer)
    fixed.change(module, name, made.to(stock.dtype))
    # a kind that transformers leaves alone
    fixed.change(module, "rope_type", "default" if kind is None else module.rope_type | {kind: "default"})


@torch.no_grad()
def _check(module: nn.Module, kind: str | None, rope: Rope) -> None:
    """Refuse a module that rotates a position in another way when a far one is in the same pass."""
    device = next((tensor.device for tensor in module.buffers()), torch.device("cpu"))
    if device.type == "meta":
        return
    near = torch.arange(_NEAR, device=device)[None]
    far = torch.cat([near, near.new_tensor([[_FAR]])], 1)
    layer = () if kind is None else (kind,)
    # some take three positions a token, for images
    for shape in ((), (3, 1, 1)):
        try:
            x = torch.zeros(1, device=device)
            short, long = (module(x, p.repeat(*shape) if shape else p, *layer) for p in (near, far))
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
            continue
        pairs = zip(short, long, strict=True) if isinstance(short, tuple) else [(short, long)]
        if all(torch.equal(a, b[..., :_NEAR, :]) for a, b in pairs):
            return
        break
    raise UnsupportedModelError(
        f"{rope.name} models with rope_type {rope.kind} cannot be bounded: {type(module).__name__} does not "
        "rotate a position in the same way whatever comes after it; use another model"
    )


def _prepare(model: Any, *args: Any, **kwargs: Any) -> Any:
    """``prepare_inputs_for_generation`` that keeps a bounded cache it was given."""
    given = [value for value in (*args, *kwargs.values()) if isinstance(value, BoundedCache)]
    made = getattr(type(model), _PREPARE)(model, *args, **kwargs)
    if not given or any(value is given[0] for value in made.values()):
        return made
    return getattr(GenerationMixin, _PREPARE)(model, *args, **kwargs)
