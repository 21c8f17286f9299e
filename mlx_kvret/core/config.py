"""Validated, frozen configuration of gates and of eviction. Nothing else carries options around."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ..errors import ConfigError
from .bits import KVBits, parse_bits
from .options import number, of_type, whole

Kind = Literal["rg", "rg10"]
Scope = Literal["global", "layer", "head", "modality"]
Policy = Literal["learned", "recent", "random", "knorm", "keydiff", "full"]

ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "relu")
DEFAULT_BUDGET = 1024
# positions are 32-bit numbers, and the random policy mixes that many bits
MOST_TOKENS, MOST_POLICY_SEED = 2**31 - 1, 2**32 - 1
# beyond any model: what a damaged file says must not decide how long a loop or how large an array gets
_MOST_GATES = {"layers": 4096, "kv_heads": 2**16, "hidden_size": 2**20, "width": 2**20}


def _choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} is {value!r}; expected one of {', '.join(allowed)}")


def _check_threshold(name: str, value: object) -> None:
    number(name, value, "α with 0 < α <= 1", 0, 1)
    if not value:
        raise ConfigError(f"{name} is 0; expected α with 0 < α <= 1, or none")


@dataclass(frozen=True)
class EvictionDefaults:
    """How a set of gates wants to be used: the eviction options it was validated with.

    They hold wherever the user says nothing, with the policy that uses the gates. None is no wish.
    ``smallest_budget`` (tokens per KV head) is the lowest at which the gates were found sound; the other
    fields are those of :class:`EvictionConfig`.
    """

    sinks: int | None = None
    window: int | None = None
    threshold: float | None = None
    scope: Scope | None = None
    min_per_head: int | None = None
    smallest_budget: int | None = None

    def __post_init__(self) -> None:
        for name in ("sinks", "window", "min_per_head"):
            if getattr(self, name) is not None:
                whole(f"the gates' {name}", getattr(self, name), 0, MOST_TOKENS)
        if self.smallest_budget is not None:
            whole("the gates' smallest_budget", self.smallest_budget, 1, MOST_TOKENS)
        if self.scope is not None:
            _choice("the gates' scope", self.scope, get_args(Scope))
        if self.threshold is not None:
            _check_threshold("the gates' threshold", self.threshold)

    def options(self) -> dict[str, Any]:
        """The eviction options that are wished for."""
        return {name: value for name, value in self.to_dict().items() if name != "smallest_budget"}

    def to_dict(self) -> dict[str, Any]:
        """The fields that say something."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> EvictionDefaults:
        return _from_dict(cls, data, "gates' eviction defaults")


@dataclass(frozen=True)
class GateConfig:
    """Shape and origin of a set of retention gates.

    ``kind`` is ``"rg"`` (two projections, TRIM-KV, arXiv 2512.03324) or ``"rg10"`` (three projections,
    arXiv 2605.09649). With ``shared_projection`` the last projection and the bias are stored once and
    used by every layer, which makes scores of different layers comparable.
    ``training_budget`` is M (tokens per KV head) of the capacity loss the gates were trained with.
    ``base_fingerprint`` is :func:`mlx_kvret.core.fingerprint.fingerprint` of the base model's config.
    ``eviction`` holds the eviction options the gates were validated with, if they say any.
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
    eviction: EvictionDefaults | None = None

    def __post_init__(self) -> None:
        _choice("gate kind", self.kind, get_args(Kind))
        _choice("gate activation", self.activation, ACTIVATIONS)
        for name, most in _MOST_GATES.items():
            whole(f"gate {name}", getattr(self, name), 1, most)
        if self.training_budget is not None:
            whole("training_budget", self.training_budget, 1, MOST_TOKENS)
        of_type("shared_projection", self.shared_projection, bool, "true or false")
        for name in ("base_model", "base_fingerprint"):
            of_type(name, getattr(self, name), str, "a text")
        number("bias_init", self.bias_init, "a finite number")
        of_type("gate eviction", self.eviction, (EvictionDefaults, type(None)), "EvictionDefaults or None")

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
        data = dataclasses.asdict(self)
        del data["eviction"]  # releases before this field read gates that say nothing
        return data if self.eviction is None else data | {"eviction": self.eviction.to_dict()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> GateConfig:
        if isinstance(data, dict) and data.get("eviction") is not None:
            data = data | {"eviction": EvictionDefaults.from_dict(data["eviction"])}
        return _from_dict(cls, data, "gate configuration")


@dataclass(frozen=True)
class EvictionConfig:
    """How a cache is kept within its budget.

    Args:
        budget: M, kept tokens per KV head, on average over the scope.
        buffer: B, tokens per KV head the cache may grow beyond M before a compaction is due.
        scope: entries compete over all layers and heads (``"global"``), within a layer or within a head; or
            globally, but text with text and pictures with pictures (``"modality"``).
        policy: ``"learned"`` (retention gates), a baseline that needs none, or ``"full"`` (never evicts).
        min_per_head: each head first keeps its own best that many entries, protected ones included.
        sinks: the first positions, never evicted.
        window: the most recent positions, never evicted.
        lookahead: K, steps over which the future utility is summed.
        threshold: α; entries with a score below log α are dropped at a compaction even within the budget.
        policy_seed: of the ``random`` policy, 32 bits.
        picture_share: part of the budget that is the pictures', 0 to 1, with the scope ``"modality"`` only;
            what either modality has too few entries to fill is the other's.
        kv_bits: kept keys and values in 8 bits, 4, or ``"k8v4"``; None for the model's float type, in which
            the newest tokens are in any case.
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
    policy_seed: int = 0
    picture_share: float | None = None
    kv_bits: KVBits = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "kv_bits", parse_bits(self.kv_bits))
        whole("budget", self.budget, 1, MOST_TOKENS)
        for name in ("buffer", "min_per_head", "sinks", "window"):
            whole(name, getattr(self, name), 0, MOST_TOKENS)
        whole("lookahead", self.lookahead, 1, MOST_TOKENS)
        whole("policy_seed", self.policy_seed, 0, MOST_POLICY_SEED)
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
        if self.kv_bits is not None and self.policy == "full":
            raise ConfigError(
                f"kv_bits={self.kv_bits!r} has no effect with the policy 'full', whose cache is the model's "
                "own; drop it, or choose a policy that bounds the cache"
            )
        if self.policy_seed and self.policy != "random":
            raise ConfigError(_needless_seed(self.policy_seed, self.policy))
        if self.threshold is not None:
            _check_threshold("threshold", self.threshold)
        self._check_share()

    def _check_share(self) -> None:
        if (self.scope == "modality") != (self.picture_share is not None):
            raise ConfigError(
                f"picture_share is {self.picture_share}, the scope is {self.scope!r}; a share goes with the "
                "scope 'modality', and that scope with a share"
            )
        if self.picture_share is None:
            return
        number("picture_share", self.picture_share, "a part of the budget, 0 to 1", 0, 1)
        if self.min_per_head:
            raise ConfigError(
                f"min_per_head is {self.min_per_head}, and the scope 'modality' splits the budget already; "
                "drop one of them"
            )

    @classmethod
    def create(
        cls,
        budget: int = DEFAULT_BUDGET,
        buffer: int | None = None,
        scope: Scope | None = None,
        policy: Policy = "learned",
        sinks: int | None = None,
        window: int | None = None,
        policy_seed: int | None = None,
        picture_share: float | None = None,
        **options: Any,
    ) -> EvictionConfig:
        """Fill in what the policy usually wants: B = M/8; a baseline protects 4 sinks and a recent window.

        Learned gates find sinks and windows by themselves and compete globally. The baselines' scores
        are comparable within a head only, so their scope is ``"head"`` unless given.
        """
        _choice("policy", policy, get_args(Policy))
        whole("budget", budget, 1, MOST_TOKENS)
        if policy_seed is not None and policy != "random":
            raise ConfigError(_needless_seed(policy_seed, policy))
        heuristic = policy not in ("learned", "full")
        if sinks is None:
            sinks = min(4, budget // 4) if heuristic else 0
        if window is None:
            window = min(32, budget // 4) if heuristic else 0
        if scope is None:
            scope = "head" if heuristic else "global"
        if buffer is None:
            buffer = max(1, budget // 8)
        if picture_share is None and scope == "modality":
            picture_share = 0.5
        own: dict[str, Any] = {"sinks": sinks, "window": window, "policy_seed": policy_seed or 0}
        return cls(budget, buffer, scope, policy, picture_share=picture_share, **own, **options)

    def to_dict(self) -> dict[str, Any]:
        data = dataclasses.asdict(self)
        if self.picture_share is None:
            del data["picture_share"]  # releases before this field read files of text
        if self.kv_bits is None:
            del data["kv_bits"]  # releases before this field read caches that do without it
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> EvictionConfig:
        return _from_dict(cls, _renamed(data), "eviction configuration")


def _needless_seed(seed: object, policy: object) -> str:
    return f"policy_seed is {seed!r}, the policy is {policy!r} and draws nothing; drop it"


def _renamed(data: dict[str, Any]) -> dict[str, Any]:
    """``seed`` of earlier files, of which the random policy took 32 bits and the others none."""
    if not isinstance(data, dict) or "seed" not in data or "policy_seed" in data:
        return data
    rest = {name: value for name, value in data.items() if name != "seed"}
    whole("seed", data["seed"], 0)
    used = data.get("policy", EvictionConfig.policy) == "random"
    return rest | {"policy_seed": data["seed"] & MOST_POLICY_SEED if used else 0}


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
