"""What a model and its gates were made for: joined with what the user said, or told where it is left."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from .config import GateConfig
from .fingerprint import text_config

_LOG = logging.getLogger("mlx_kvret")
_warned: set[tuple[Any, int]] = set()


def advised(options: dict[str, Any], gates: GateConfig | None, budget: int) -> dict[str, Any]:
    """A user's eviction options, and those of the gates' own (``gates.eviction``) where nothing was said.

    Only the policy that uses the gates has such defaults. A threshold of None is said: it means none. A
    ``budget`` below the smallest at which the gates were found sound is logged as a warning, once.
    """
    if gates is None or gates.eviction is None or options.get("policy", "learned") != "learned":
        return options
    least = gates.eviction.smallest_budget
    if least is not None and budget < least and (gates, budget) not in _warned:
        _warned.add((gates, budget))
        _LOG.warning(
            "a budget of %d tokens per head is below %d, the smallest at which these gates were found sound; "
            "expect losses, or raise the budget",
            budget,
            least,
        )
    said = {name: value for name, value in options.items() if value is not None or name == "threshold"}
    wished = gates.eviction.options()
    if said.get("scope") == "modality":
        # a budget that is split already takes no minimum
        wished.pop("min_per_head", None)
    return options | wished | said


def reach_of(config: Mapping[str, Any]) -> int | None:
    """The tokens that a model was made for, by its ``config.json``; None where it does not say."""
    text = text_config(dict(config))
    most = text.get("max_position_embeddings")
    if not isinstance(most, int) or not 0 < most < 2**31:
        return None
    scaling = text.get("rope_scaling") or text.get("rope_parameters")
    # configs state the length before or after stretching
    scaling = scaling if isinstance(scaling, dict) else {}
    factor, before = scaling.get("factor"), scaling.get("original_max_position_embeddings", most)
    numbers = isinstance(factor, (int, float)) and math.isfinite(factor) and isinstance(before, int)
    return max(most, int(factor * before)) if numbers else most


def tell_reach(model: str, reach: int | None, before: int, after: int) -> None:
    """Warn, once of each ``model``, when a sequence goes from ``before`` to ``after`` tokens, past its reach.

    A budget bounds memory; positions go on, and a model gets worse beyond those that it has learnt.
    """
    if reach is not None and before <= reach < after and (model, reach) not in _warned:
        _warned.add((model, reach))
        _LOG.warning(
            "the text is longer than the %d tokens this model was made for (max_position_embeddings); expect "
            "worse answers from here on, with any cache",
            reach,
        )
