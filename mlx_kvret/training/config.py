"""Validated settings of a training run: everything that decides which weights come out."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ..core.config import ACTIVATIONS, EvictionDefaults, GateConfig, Kind, Scope
from ..core.fingerprint import fingerprint, text_config
from ..core.options import MAX_SEED, number, whole
from ..errors import ConfigError

TrainScope = Literal["global", "head"]
Loss = Literal["all", "assistant"]
DType = Literal["auto", "float32", "bfloat16", "float16"]

_ALIASES = {"swish": "silu", "gelu_new": "gelu_pytorch_tanh"}


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a run; the defaults learn in minutes as in hours, see ``benchmarks/LOG.md``.

    :data:`PAPER` holds what the published settings (arXiv 2605.09649) have otherwise.

    Args:
        kind, width, bias, shared_projection: of the gates, see :class:`GateConfig`.
        budget: M of the capacity loss, tokens per KV head. Inference may use any other.
        tighten: share of the run over which the capacity loss comes down from the full cache to M. At once
            (0), gates fade everything before they can tell what is of use, attention sinks included.
        sinks: first positions of a document that do not fade, nor are evicted later: the checkpoint says so.
        scope: the soft cache is held to M on average over all heads, or in every head (TRIM-KV).
        capacity_weight: λ.
        length: tokens of a packed sequence, T.
        batch: sequences of a step, over all processes.
        loss: learn from every token, or from what the assistant says in ``messages`` records.
        learning_rate: the highest one; it rises over the first ``warmup`` and falls as a cosine.
        warmup: in steps, or below 1 as a share of the run.
        epochs: passes over the data, 1 unless ``steps`` says how many steps to take.
        clip: largest norm of the gradient.
        weight_decay: of AdamW.
        dtype: of the base model; the gates are float32 always.
        seed: of the gates' first weights and the order of the data.
    """

    kind: Kind = "rg10"
    width: int = 64
    bias: float = 10.0
    shared_projection: bool = True
    budget: int = 128
    scope: TrainScope = "global"
    capacity_weight: float = 1.0
    tighten: float = 0.5
    sinks: int = 0
    length: int = 2048
    batch: int = 1
    loss: Loss = "all"
    learning_rate: float = 3e-3
    warmup: float = 10.0
    epochs: int | None = None
    steps: int | None = None
    clip: float = 1.0
    weight_decay: float = 0.0
    dtype: DType = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (("kind", Kind), ("scope", TrainScope), ("loss", Loss), ("dtype", DType)):
            if getattr(self, name) not in get_args(allowed):
                expected = ", ".join(get_args(allowed))
                raise ConfigError(f"{name} is {getattr(self, name)!r}; expected one of {expected}")
        for name, least in (
            ("width", 1),
            ("budget", 1),
            ("length", 2),
            ("batch", 1),
            ("sinks", 0),
        ):
            whole(name, getattr(self, name), least)
        whole("seed", self.seed, 0, MAX_SEED)
        if self.steps is None:
            object.__setattr__(self, "epochs", 1 if self.epochs is None else self.epochs)
            whole("epochs", self.epochs, 1)
        elif self.epochs is None:
            whole("steps", self.steps, 1)
        else:
            raise ConfigError(f"steps is {self.steps} and epochs is {self.epochs}; give one of them")
        self._number("bias", -math.inf)
        self._number("capacity_weight", 0)
        self._number("weight_decay", 0)
        self._number("learning_rate", 0, above=True)
        self._number("clip", 0, above=True)
        self._number("warmup", 0)
        self._number("tighten", 0)
        if self.tighten > 1:
            raise ConfigError(f"tighten is {self.tighten}; expected a share of the run, from 0 to 1")
        if self.budget >= self.length:
            raise ConfigError(
                f"budget is {self.budget} tokens per head and sequences have {self.length}, so nothing would "
                "ever be over the budget; lower the budget or raise the length"
            )

    def _number(self, name: str, least: float, above: bool = False) -> None:
        bound = "" if math.isinf(least) else f" {'above' if above else 'of at least'} {least:g}"
        lowest = math.nextafter(least, math.inf) if above else least
        number(name, getattr(self, name), f"a number{bound}", lowest)

    def check_model(self, config: dict[str, Any]) -> None:
        """Refuse sequences longer than the base model (its ``config.json``) was made for."""
        longest = text_config(config).get("max_position_embeddings")
        if isinstance(longest, int) and self.length > longest:
            raise ConfigError(
                f"length is {self.length} tokens, the model was made for {longest}; lower the length"
            )

    def gates(
        self, layers: int, kv_heads: int, hidden_size: int, model: dict[str, Any], name: str
    ) -> GateConfig:
        """The configuration of new gates for a base model, given its ``config.json`` and its name.

        They use the model's activation if it is one of ACTIVATIONS, else silu.
        """
        text = text_config(model)
        activation = str(text.get("hidden_act") or text.get("hidden_activation"))
        activation = _ALIASES.get(activation, activation)
        return GateConfig(
            kind=self.kind,
            layers=layers,
            kv_heads=kv_heads,
            hidden_size=hidden_size,
            width=self.width,
            activation=activation if activation in ACTIVATIONS else "silu",
            bias_init=self.bias,
            shared_projection=self.shared_projection,
            training_budget=self.budget,
            base_model=name,
            base_fingerprint=fingerprint(model),
            eviction=self._eviction(),
        )

    def _eviction(self) -> EvictionDefaults | None:
        """What gates trained like this must be used with."""
        scope: Scope | None = "head" if self.scope == "head" else None
        return EvictionDefaults(sinks=self.sinks or None, scope=scope) if self.sinks or scope else None

    def slack(self, progress: float) -> float:
        """What the capacity loss lets pass at this share of the run: 1 is the full cache, 0 none above M."""
        return max(0.0, 1 - progress / self.tighten) if self.tighten else 0.0

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


# what the published settings have otherwise: made for long runs on long texts
PAPER: dict[str, Any] = {
    "width": 512,
    "bias": 18.0,
    "tighten": 0.0,
    "length": 16384,
    "batch": 4,
    "learning_rate": 2e-4,
    "warmup": 0.03,
}


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Settings in which two runs differ, each as ``"batch is 8, was 4"``."""
    return [
        f"{name} is {found.get(name)!r}, was {expected.get(name)!r}"
        for name in sorted(found.keys() | expected.keys())
        if found.get(name) != expected.get(name)
    ]
