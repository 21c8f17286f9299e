"""How gates want to be used, joined with what the user said."""

from __future__ import annotations

import logging
from typing import Any

from .config import GateConfig

_LOG = logging.getLogger("mlx_kvret")
_warned: set[tuple[GateConfig, int]] = set()


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
