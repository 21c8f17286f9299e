"""What the demo model and its gates are trained on: streams, copies and stories with questions."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from mlx_kvret.demo.language import (
    BOS,
    END,
    FILLER,
    FIRST_FILLER,
    FIRST_NAME,
    FIRST_VALUE,
    NAMES,
    RECALL,
    REMEMBER,
    RUMOUR,
    VALUES,
    WORDS,
    filler,
    other_value,
    question,
    story,
)

Rng = np.random.Generator


@dataclass
class Stream:
    """``ids``; ``answers``: places of what must be predicted; ``starts``: places where an element begins."""

    ids: list[int]
    answers: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)


def stream(rng: Rng, tokens: int, decoys: bool = True) -> Stream:
    """An endless mixture of facts, decoys, questions and filler in random proportions, ``tokens`` long."""
    rates = rng.uniform((0.05, 0, 0.15, 0.05), (0.4, 0.4 * decoys, 0.4, 0.5))
    thresholds = rates.cumsum() / rates.sum()
    longest = int(rng.integers(2, 16))
    unused, facts = list(FIRST_NAME + rng.permutation(len(NAMES))), list[tuple[int, int]]()
    previous = FIRST_FILLER + int(rng.integers(len(FILLER)))
    out = Stream([BOS])
    while len(out.ids) < tokens:
        out.starts.append(len(out.ids))
        kind = int(np.searchsorted(thresholds, rng.random()))
        if kind == 0 and unused:
            facts.append((int(unused.pop()), FIRST_VALUE + int(rng.integers(len(VALUES)))))
            out.ids += [REMEMBER, *facts[-1]]
        elif kind == 1:
            known = facts and rng.random() < 0.5
            name = facts[rng.integers(len(facts))][0] if known else FIRST_NAME + int(rng.integers(len(NAMES)))
            out.ids += [RUMOUR, name, other_value(rng, dict(facts).get(name))]
        elif kind == 2 and facts:
            out.answers.append(len(out.ids) + 2)
            out.ids += [RECALL, *facts[rng.integers(len(facts))], END]
        else:
            words = filler(rng, int(rng.integers(1, longest)), previous)
            out.ids, previous = out.ids + words, words[-1]
    return Stream(out.ids[:tokens], [a for a in out.answers if a < tokens], out.starts)


def copies(rng: Rng, tokens: int) -> Stream:
    """Random words, repeated again and again; all of every repetition but its first word is an answer."""

    def draw(count: int) -> list[int]:
        return rng.integers(FIRST_NAME, len(WORDS), size=count).tolist()

    pattern = draw(int(rng.integers(6, tokens // 2)))
    out = Stream([BOS, *draw(int(rng.integers(8))), *pattern])
    while len(out.ids) < tokens:
        out.ids += draw(int(rng.integers(4)))
        out.answers += range(len(out.ids) + 1, len(out.ids) + len(pattern))
        out.ids += pattern
    return Stream(out.ids[:tokens], [a for a in out.answers if a < tokens])


def questioned_story(rng: Rng, tokens: int) -> Stream:
    """A story with 8 to 32 facts and as many decoys as it may be, then 4 to 24 questions."""
    asked = int(rng.integers(4, 25))
    facts = max(asked, int(rng.integers(8, 33)))
    length = tokens - 4 * asked
    text = story(length, facts, int(rng.integers(max(1, (length - 1) // 3 - facts))), rng)
    out = Stream(list(text.ids))
    for name in rng.permutation(list(text.facts))[:asked]:
        out.answers.append(len(out.ids) + 2)
        out.ids += [*question(name), WORDS.index(text.facts[name]), END]
    return out


def positions(rng: Rng, starts: list[int], tokens: int, longest: int) -> np.ndarray:
    """Positions of ``tokens`` tokens that skip ahead between elements, most often; below ``longest``."""
    position = np.arange(tokens)
    if rng.random() < 0.25:
        return position
    skipped, cuts = int(rng.integers(longest - tokens)), int(rng.integers(1, 9))
    inside = [start for start in starts if start < tokens]
    places = np.sort(rng.choice(inside, size=min(cuts, len(inside)), replace=False)) if inside else []
    first, *others = (rng.dirichlet(np.ones(len(places) + 1)) * skipped).astype(int)
    position += first
    for place, skip in zip(places, others, strict=True):
        position[place:] += skip
    return position


def batch(streams: list[Stream]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs (B, T), targets (B, T) and the weight of each target's loss (B, T), of streams of T + 1 tokens.

    The weights are 1 on average over answers, 0.1 over the ends of answers and 0.1 over all other words.
    """
    ids = torch.tensor([s.ids for s in streams])
    answer = torch.zeros(ids.shape, dtype=torch.bool)
    for row, s in enumerate(streams):
        answer[row, s.answers] = True
    answer, target = answer[:, 1:], ids[:, 1:]
    end = target == END
    rest = ~(answer | end)
    parts = ((1, answer), (0.1, end), (0.1, rest))
    weight = torch.stack([share * part / part.sum().clamp(min=1) for share, part in parts]).sum(0)
    return ids[:, :-1], target, weight
