"""A model's layers compiled for recorded steps: what lies between attentions becomes a few kernels.

Norms, rotations, activations and casts of a layer are many small kernels; compiled by torch they are fused.
Attention stays what it is: one operation of its own that a compiler does not look into. As layers differ in
nothing else, one is compiled for all of a kind. On by ``mlx_kvret.load(..., compile=True)``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from mlx_kvret.errors import ConfigError, UnsupportedFeatureError

from .fixed import FixedCache, FixedLayer, current
from .kernels.dispatch import enabled
from .modules import attention_modules
from .reading import Reading
from .ring import Ring

# torch's compiler by name
BACKEND = "inductor"
_WANTED = "_kvret_compile"


def want(model: nn.Module, device: torch.device) -> None:
    """Have recorded steps of a model compiled.

    Raises:
        ConfigError: none are recorded on that device.
    """
    if not enabled(device):
        raise ConfigError(f"compile=True compiles recorded steps, of which {device} has none; drop it")
    vars(model)[_WANTED] = True


def wanted(model: nn.Module) -> bool:
    return bool(vars(model).get(_WANTED))


# written out, for releases of torch differ in what they read off annotations
SCHEMA = (
    "(Tensor x, Tensor queries, Tensor keys, Tensor values, Tensor? sinks, float scale, float softcap, "
    "int window) -> Tensor"
)


@torch.library.custom_op("kvret::attend", mutates_args=(), schema=SCHEMA)
def attend_next(
    x: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor,
    sinks: torch.Tensor | None, scale: float, softcap: float, window: int,
) -> torch.Tensor:  # fmt: skip
    """The next layer of the step under way takes in what the token brings, and attends: (R, Hq, 1, Dv).

    ``softcap`` and ``window`` are 0 where there is none. Which layer is next is known to the step, so that
    all layers are the same to a compiler.
    """
    step = current()
    assert isinstance(step, CompiledCache)
    options = {"scaling": scale, "softcap": softcap or None, "s_aux": sinks, "sliding_window": window or None}
    return step.attend_next(x, queries, keys, values, options)


@attend_next.register_fake
def _shape(x: Any, queries: Any, keys: Any, values: Any, *rest: Any) -> torch.Tensor:
    out: torch.Tensor = queries.new_empty(*queries.shape[:3], values.shape[-1])
    return out


class CompiledCache(FixedCache):
    """As :class:`.fixed.FixedCache`, for layers that are compiled: they tell it in which order they come."""

    def __init__(self, reading: Reading, layers: Sequence[FixedLayer | Ring]) -> None:
        super().__init__(reading, layers)
        self.x: torch.Tensor | None = None
        self.key: torch.Tensor | None = None
        self.value: torch.Tensor | None = None
        self._turn = 0

    # what is below is compiled, and must not tell one layer from another

    def observe(self, module: Any, x: torch.Tensor) -> None:
        self.x = x

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.key, self.value = key_states, value_states
        return key_states, value_states

    def owner_of(self, keys: torch.Tensor) -> Any:
        return self if keys is self.key else None

    def attend(self, queries: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        x, keys, values = self.x, self.key, self.value
        assert x is not None and keys is not None and values is not None
        self.x = self.key = self.value = None
        scale = options.get("scaling")
        scale = queries.shape[-1] ** -0.5 if scale is None else scale
        softcap, window = options.get("softcap") or 0.0, options.get("sliding_window") or 0
        out: torch.Tensor = torch.ops.kvret.attend(
            x, queries, keys, values, options.get("s_aux"), scale, softcap, window
        )
        return out

    # and this is not

    def attend_next(
        self, x: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor,
        options: dict[str, Any],
    ) -> torch.Tensor:  # fmt: skip
        """What :func:`attend_next` does."""
        part, self._turn = self._parts[self._turn], self._turn + 1
        part.observe(x)
        part.update(keys, values)
        return part.attend(queries, options)

    def run(self, forward: Any) -> Any:
        self._turn = 0
        return super().run(forward)


@contextmanager
def compiled(model: PreTrainedModel) -> Iterator[None]:
    """The layers of a model compiled, inside of a recording; they are stock ones elsewhere.

    Raises:
        UnsupportedFeatureError: they cannot be told apart from the rest of the model.
    """
    layers = _layers(model)
    before = [vars(layer).get("forward") for layer in layers]
    # a step of each number of rows, and layers of several kinds, are compiled from the same code
    limit = torch._dynamo.config.patch(recompile_limit=64)
    how: dict[str, Any] = {"fullgraph": True, "dynamic": False, "backend": BACKEND}
    try:
        for layer in layers:
            vars(layer)["forward"] = torch.compile(layer.forward, **how)
        with limit:
            yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            if own is None:
                vars(layer).pop("forward", None)
            else:
                vars(layer)["forward"] = own


def _layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers of the decoder, each with one attention."""
    decoder = model.get_decoder()
    attention = list(attention_modules(model).values())
    layers = list(getattr(decoder, "layers", ()))
    if [sum(own in list(layer.modules()) for own in attention) for layer in layers] != [1] * len(attention):
        raise UnsupportedFeatureError("the model's layers do not have one attention each")
    return layers
