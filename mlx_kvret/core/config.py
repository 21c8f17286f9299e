"""Validated, frozen configuration of gates and of eviction. Nothing else carries options around."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ..errors import ConfigError

Kind = Literal["rg", "rg10"]
Scope = Literal["global", "layer", "head"]
Policy = Literal["learned", "recent", "random", "knorm", "keydiff", "full"]

ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")
DEFAULT_BUDGET = 1024


def _choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} is {value!r}; expected one of {', '.join(allowed)}")


def _of_type(name: str, value: object, kind: type, what: str) -> None:
    if not isinstance(value, kind):
        raise ConfigError(f"{name} is {value!r}; expected {what}")


def _at_least(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{name} is {value!r}; expected a whole number of at least {least}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@dataclass(frozen=True)
class GateConfig:
    """Shape and origin of a set of retention gates.

    ``kind`` is ``"rg"`` (two projections, TRIM-KV, arXiv 2512.03324) or ``"rg10"`` (three projections,
    arXiv 2605.09649). With ``shared_projection`` the last projection and the bias are stored once and
    used by every layer, which makes scores of different layers comparable.
    ``training_budget`` is M (tokens per KV head) of the capacity loss the gates were trained with.
    ``base_fingerprint`` is :func:`mlx_kvret.core.fingerprint.fingerprint` of the base model's config.
    """

    kind: Kind
    layers: int
    kv_heads: int
    hidden_size: int
    width: int = 512
    activation: str = "silu"
    bias_init: float = 18.0
    shared_projection: bool = True
    training_budget: int | None = None
    base_model: str = ""
    base_fingerprint: str = ""

    def __post_init__(self) -> None:
        _choice("gate kind", self.kind, get_args(Kind))
        _choice("gate activation", self.activation, ACTIVATIONS)
        for name in ("layers", "kv_heads", "hidden_size", "width"):
            _at_least(f"gate {name}", getattr(self, name), 1)
        if self.training_budget is not None:
            _at_least("training_budget", self.training_budget, 1)
        _of_type("shared_projection", self.shared_projection, bool, "true or false")
        for name in ("base_model", "base_fingerprint"):
            _of_type(name, getattr(self, name), str, "a text")
        if not _is_number(self.bias_init) or not abs(self.bias_init) <= sys.float_info.max:
            raise ConfigError(f"bias_init is {self.bias_init!r}; expected a finite number")

    @property
    def projections(self) -> tuple[str, ...]:
        """Names of the linear maps, first to last."""
        return ("linear1", "linear2") if self.kind == "rg" else ("linear1", "linear2", "linear3")

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of the shared checkpoint; the one definition of its layout."""
        shapes: dict[str, tuple[int, ...]] = {}
        *inner, last = self.projections
        for layer in range(self.layers):
            rows, prefix = self.hidden_size, f"layers.{layer}."
            for name in inner:
                shapes[f"{prefix}{name}.weight"] = (self.width, rows)
                shapes[f"{prefix}{name}.bias"] = (self.width,)
                rows = self.width
            if not self.shared_projection:
                shapes[f"{prefix}{last}.weight"] = (self.kv_heads, self.width)
                shapes[f"{prefix}bias"] = (self.kv_heads,)
        if self.shared_projection:
            shapes[f"shared.{last}.weight"] = (self.kv_heads, self.width)
            shapes["shared.bias"] = (self.kv_heads,)
        return shapes

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> GateConfig:
        return _from_dict(cls, data, "gate configuration")


@dataclass(frozen=True)
class EvictionConfig:
    """How a cache is kept within its budget.

    Args:
        budget: M, kept tokens per KV head, on average over the scope.
        buffer: B, tokens per KV head the cache may grow beyond M before a compaction is due.
        scope: entries compete over all layers and heads (``"global"``), within a layer or within a head.
        policy: ``"learned"`` (retention gates), a baseline that needs none, or ``"full"`` (never evicts).
        min_per_head: each head first keeps its own best that many entries, protected ones included.
        sinks: the first positions, never evicted.
        window: the most recent positions, never evicted.
        lookahead: K, steps over which the future utility is summed.
        threshold: α; entries with a score below log α are dropped at a compaction even within the budget.
        seed: of the ``random`` policy, which looks at its low 32 bits.
    """

    budget: int = DEFAULT_BUDGET
    buffer: int = DEFAULT_BUDGET // 8
    scope: Scope = "global"
    policy: Policy = "learned"
    min_per_head: int = 0
    sinks: int = 0
    window: int = 0
    lookahead: int = 1
    threshold: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _at_least("budget", self.budget, 1)
        for name in ("buffer", "min_per_head", "sinks", "window", "seed"):
            _at_least(name, getattr(self, name), 0)
        _at_least("lookahead", self.lookahead, 1)
        _choice("scope", self.scope, get_args(Scope))
        _choice("policy", self.policy, get_args(Policy))
        if self.sinks + self.window > self.budget:
            raise ConfigError(
                f"sinks + window is {self.sinks} + {self.window}, more than the budget of {self.budget}; "
                "lower them or raise the budget"
            )
        if self.min_per_head > self.budget:
            raise ConfigError(
                f"min_per_head is {self.min_per_head}, more than the budget of {self.budget}; lower it"
            )
        if self.policy != "learned" and (self.lookahead != 1 or self.threshold is not None):
            raise ConfigError(
                f"lookahead and threshold act on learned scores, the policy is {self.policy!r}; drop them"
            )
        if self.threshold is not None and not (_is_number(self.threshold) and 0 < self.threshold <= 1):
            raise ConfigError(f"threshold is {self.threshold!r}; expected α with 0 < α <= 1")

    @classmethod
    def create(
        cls,
        budget: int = DEFAULT_BUDGET,
        buffer: int | None = None,
        scope: Scope | None = None,
        policy: Policy = "learned",
        sinks: int | None = None,
        window: int | None = None,
        **options: Any,
    ) -> EvictionConfig:
        """Fill in what the policy usually wants: B = M/8; a baseline protects 4 sinks and a recent window.

        Learned gates find sinks and windows by themselves and compete globally. The baselines' scores
        are comparable within a head only, so their scope is ``"head"`` unless given.
        """
        _choice("policy", policy, get_args(Policy))
        _at_least("budget", budget, 1)
        heuristic = policy not in ("learned", "full")
        if sinks is None:
            sinks = min(4, budget // 4) if heuristic else 0
        if window is None:
            window = min(32, budget // 4) if heuristic else 0
        if scope is None:
            scope = "head" if heuristic else "global"
        if buffer is None:
            buffer = max(1, budget // 8)
        return cls(budget, buffer, scope, policy, sinks=sinks, window=window, **options)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> EvictionConfig:
        return _from_dict(cls, data, "eviction configuration")


def _from_dict(cls: Any, data: dict[str, Any], what: str) -> Any:
    if not isinstance(data, dict):
        raise ConfigError(f"the {what} is a {type(data).__name__}; expected an object with named fields")
    known = {f.name for f in dataclasses.fields(cls)}
    if unknown := sorted(set(data) - known):
        raise ConfigError(f"the {what} has unknown fields {', '.join(unknown)}; written by a newer version?")
    try:
        return cls(**data)
    except TypeError as error:
        raise ConfigError(f"the {what} is incomplete: {error}") from error
