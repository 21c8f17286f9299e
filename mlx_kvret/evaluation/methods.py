"""The policies that are compared, by name: those of the product, and references that see more than it does.

A method is written ``NAME`` or ``NAME:OPTION=VALUE,...``, with the options of
:class:`~mlx_kvret.core.config.EvictionConfig`: ``learned:scope=head,lookahead=8``, ``keydiff:sinks=0``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..core.advice import advised
from ..core.config import EvictionConfig, GateConfig
from ..core.options import check_known, nearest
from ..errors import ConfigError

# they look at attention or at the task's answers, which no cache can
REFERENCES = ("snapkv", "h2o", "oracle")
_POLICIES = ("full", "learned", "recent", "random", "knorm", "keydiff", *REFERENCES)
_SHORT = {
    "learned-global": ("learned", {"scope": "global"}),
    "learned-layer": ("learned", {"scope": "layer"}),
    "learned-head": ("learned", {"scope": "head"}),
    "learned-modality": ("learned", {"scope": "modality"}),
}
NAMES = ("full", *_SHORT, "recent", "random", "knorm", "keydiff", *REFERENCES)
_TYPES = {
    "scope": str,
    "min_per_head": int,
    "sinks": int,
    "window": int,
    "lookahead": int,
    "threshold": float,
    "policy_seed": int,
    "picture_share": float,
    "kv_bits": str,
}


@dataclass(frozen=True)
class Method:
    """One policy with its options; ``name`` is what the user wrote.

    A policy without gates protects at least ``least_sinks`` positions where its options say nothing.
    """

    name: str
    policy: str
    options: tuple[tuple[str, Any], ...] = ()
    least_sinks: int = 0

    @property
    def learned(self) -> bool:
        return self.policy == "learned"

    @property
    def full(self) -> bool:
        return self.policy == "full"

    def options_at(self, budget: int) -> dict[str, Any]:
        """The eviction options at a budget, as far as the method decides them."""
        said = dict(self.options)
        if self.learned or self.full:
            return said
        options = self._own(budget) | said
        if self.least_sinks and "sinks" not in said:
            plan = EvictionConfig.create(budget, 0, policy=self._plan, **options)
            options["sinks"] = max(plan.sinks, min(self.least_sinks, budget - plan.window))
        return options

    def _own(self, budget: int) -> dict[str, Any]:
        """What a reference policy protects.

        H2O keeps its heaviest M/2 and newest M/2 (arXiv 2306.14048); SnapKV keeps its observation window of
        32 tokens (arXiv 2404.14469); the oracle keeps where the answers
        stand, then the newest: it knows them, but not what else the model needs, so it is no upper bound.
        """
        protected = {
            "h2o": {"sinks": 0, "window": budget // 2},
            "snapkv": {"sinks": 0},
            "oracle": {"sinks": 0, "window": 0},
        }
        return protected.get(self.policy, {})

    @property
    def _plan(self) -> Any:
        return "recent" if self.policy in REFERENCES else self.policy

    def eviction(self, budget: int, buffer: int, gates: GateConfig | None = None) -> EvictionConfig:
        """The plan by which entries go; for a reference policy all of it but the score.

        The learned policy has the defaults of the ``gates`` in use where the method says nothing.
        """
        options = self.options_at(budget)
        options = advised(options, gates, budget) if self.learned else options
        return EvictionConfig.create(budget, buffer, policy=self._plan, **options)

    def unlike(self, gates: GateConfig, budget: int) -> str:
        """How this differs from the use that the gates were validated for, in words; "" if it does not."""
        if gates.eviction is None:
            return ""
        said, wished = dict(self.options), gates.eviction.options()
        told = [f"{n} {said[n]}, validated with {v}" for n, v in wished.items() if said.get(n, v) != v]
        least = gates.eviction.smallest_budget
        if least is not None and budget < least:
            told.append(f"budget {budget}, found sound from {least} up")
        return "; ".join(told)


def level(methods: Iterable[Method], gates: Iterable[GateConfig]) -> tuple[Method, ...]:
    """The same methods; those without gates get the sinks that any of the learned ones has.

    A comparison would otherwise credit the gates with what a protection does.
    """
    methods, wishes = list(methods), [config.eviction for config in gates]
    sinks = [0]
    for method in methods:
        if method.learned:
            said = dict(method.options).get("sinks")
            own = [wish.sinks or 0 for wish in wishes if wish is not None] if said is None else [said]
            sinks += own
    return tuple(
        method if method.learned or method.full else dataclasses.replace(method, least_sinks=max(sinks))
        for method in methods
    )


def parse_method(text: str) -> Method:
    """A method from its name and options.

    Raises:
        ConfigError: no such method or option, or a value of the wrong kind.
    """
    head, _, tail = text.partition(":")
    policy, short = _SHORT.get(head, (head, {}))
    if policy not in _POLICIES:
        raise ConfigError(f"method {head!r} is not known; {nearest(head, NAMES)}")
    options: dict[str, Any] = dict(short)
    given = set[str]()
    for pair in filter(None, tail.split(",")):
        name, _, value = pair.partition("=")
        check_known((name,), _TYPES, f"method {text!r}")
        if name in given:
            raise ConfigError(f"method {text!r} gives {name} twice; drop one")
        given.add(name)
        off = policy == "learned" and name == "threshold" and value in ("0", "none")
        try:
            options[name] = None if off else _TYPES[name](value)
        except ValueError as error:
            raise ConfigError(
                f"method {text!r}: {name} is {value!r}; expected a value of type {_TYPES[name].__name__}"
            ) from error
    method = Method(text, policy, tuple(sorted(options.items())))
    if policy == "full" and options:
        raise ConfigError(f"method {text!r}: the full cache has no options")
    if policy in REFERENCES and "kv_bits" in options:
        raise ConfigError(f"method {text!r}: policies that look at attention store no bits; drop kv_bits")
    if policy != "full":
        # a contradiction is told now, not after hours
        method.eviction(1 << 20, 0)
    return method


def parse_methods(texts: Iterable[str]) -> list[Method]:
    """Methods in order, without repetitions."""
    return [parse_method(text) for text in dict.fromkeys(texts)]


def parse_fraction(text: str | int) -> tuple[int, int]:
    """``64`` (tokens per head) to (64, 0), ``"1/16"`` (of the text's tokens) to (1, 16).

    Raises:
        ConfigError: neither.
    """
    top, slash, bottom = str(text).partition("/")
    try:
        budget = int(top), int(bottom) if slash else 0
    except ValueError:
        budget = 0, 0
    if budget[0] < 1 or budget[1] < 0 or (slash and budget[1] < budget[0]):
        raise ConfigError(f"budget {text!r} is neither tokens per head (64) nor a share of the text (1/16)")
    return budget


def budget_tokens(text: str | int, length: int) -> int:
    """M for a text of ``length`` tokens, at least 1."""
    top, bottom = parse_fraction(text)
    return top if bottom == 0 else max(1, length * top // bottom)
