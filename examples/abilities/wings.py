"""Both backends through the public engine: the same texts, the same questions, the same numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlx_kvret.evaluation import Method, Sample, Turn
from mlx_kvret.evaluation.methods import budget_tokens

from .asking import ANSWERED, CHOSEN, COMPLETED, NATS, ask_cache
from .prose import Text

PROSE = "nats of the prose"
NAMES = (ANSWERED, COMPLETED, CHOSEN, NATS, PROSE)
# questions of each text, for words are generated token by token
ASKED = 2


def measure(engine: Any, texts: Sequence[Text], method: Method, budget: str) -> dict[str, list[float]]:
    """Texts read and asked, and their prose scored, by a public engine."""
    found: dict[str, list[float]] = {name: [] for name in NAMES}
    for text in texts:
        ids = text.sample.turns[0].ids
        tokens = 1 if method.full else budget_tokens(budget, len(ids))
        cache, chunk = engine.new_cache(method, tokens), engine.pace.chunk(None if method.full else tokens)
        engine.read(ids, cache, chunk)
        answers = ask_cache(engine, cache, text.asked[:ASKED])
        for name in NAMES[:-1]:
            found[name].append(sum(answer[name] for answer in answers) / len(answers))
        (outcome,) = engine.run([Sample((Turn(ids, scored=True),))], method, tokens)
        found[PROSE].append(outcome.score)
    return found
