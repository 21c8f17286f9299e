"""What the server has done so far, and as Prometheus reads it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass
class Metrics:
    """Counts. ``responses`` are the HTTP side's, all others the generation thread's."""

    responses: Counter[int] = field(default_factory=Counter)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated: int = 0
    hits: int = 0
    misses: int = 0
    failed_steps: int = 0
    # seconds that an answer takes, the newest counting most
    usual: float = 1.0

    def started(self, tokens: int, cached: int) -> None:
        """A prompt of so many tokens, of which so many need not be read again."""
        self.prompt_tokens += tokens
        self.cached_tokens += cached
        self.hits += cached > 0
        self.misses += cached == 0

    def ended(self, begun: float) -> None:
        """An answer is complete that was asked for at a time of :func:`time.monotonic`."""
        self.usual += 0.2 * (time.monotonic() - begun - self.usual)


_COUNTERS = {
    "prompt_tokens": ("prompt_tokens_total", "Tokens of all prompts."),
    "cached_tokens": ("cached_prompt_tokens_total", "Tokens of prompts that a snapshot had read already."),
    "generated": ("generated_tokens_total", "Tokens of all answers."),
    "hits": ("prefix_hits_total", "Prompts that went on from a snapshot."),
    "misses": ("prefix_misses_total", "Prompts that were read from the beginning."),
    "failed_steps": ("failed_steps_total", "Forward passes that failed, with the requests in them."),
}


def exposition(metrics: Metrics, gauges: Mapping[str, tuple[float, str]]) -> str:
    """Prometheus' text format, version 0.0.4; ``gauges`` are values and their meaning by name."""
    lines = []
    for name, (shown, meaning) in _COUNTERS.items():
        lines += _metric(shown, "counter", meaning, {"": getattr(metrics, name)})
    answers = {f'{{status="{status}"}}': count for status, count in sorted(metrics.responses.items())}
    lines += _metric("responses_total", "counter", "Responses by HTTP status.", answers)
    for name, (value, meaning) in gauges.items():
        lines += _metric(name, "gauge", meaning, {"": value})
    return "\n".join(lines) + "\n"


def _metric(name: str, kind: str, meaning: str, values: Mapping[str, float]) -> list[str]:
    full = f"mlx_kvret_{name}"
    rows = [f"{full}{labels} {value:g}" if isinstance(value, float) else f"{full}{labels} {value}"
            for labels, value in values.items()]  # fmt: skip
    return [f"# HELP {full} {meaning}", f"# TYPE {full} {kind}", *rows]
