"""What gates are trained on: albums with questions, and streams of everything in random proportions."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from mlx_kvret.demo import language as words
from mlx_kvret.demo.albums import SIDE, Album, album
from mlx_kvret.demo.pictures import CELL, IMAGE

Rng = np.random.Generator


@dataclass
class Text:
    """An album that goes on with questions; ``answers`` are the places of what must be predicted."""

    album: Album
    answers: list[int] = field(default_factory=list)

    def ask(self, name: int) -> None:
        """A question after a known name, its answer and the end token."""
        asked, value = self.album.question(name)
        self.answers.append(len(self.album.ids) + 2)
        self.album.ids += [*asked, value, words.END]

    def cut(self, tokens: int) -> Text:
        """The same, ``tokens`` long: filled up, or cut where no picture is."""
        ids = self.album.ids
        ids += [words.FIRST_FILLER] * (tokens - len(ids))
        del ids[tokens:]
        assert ids.count(IMAGE) == sum(p.height * p.width // CELL**2 for p in self.album.pictures)
        return Text(self.album, [a for a in self.answers if a < tokens])


def questioned_album(rng: Rng, tokens: int) -> Text:
    """6 to 20 facts, of which any number is seen, and 4 to 16 questions; few decoys or many."""
    asked = int(rng.integers(4, 17))
    facts = max(asked, int(rng.integers(6, 21)))
    seen, length = int(rng.integers(facts + 1)), tokens - 4 * asked
    text = Text(album(length, seen, facts - seen, rng, int(rng.integers(length // 50, length // 6)), SIDE))
    for name in rng.permutation(list(text.album.facts))[:asked]:
        text.ask(int(name))
    return text.cut(tokens)


def stream(rng: Rng, tokens: int) -> Text:
    """Facts, decoys, pictures of one size, questions and filler, one after another."""
    rows, columns = rng.integers(3, 8, 2).tolist()
    size, text = rows * columns, Text(Album())
    rates = rng.uniform((0.02, 0, 0.3, 0.05, 0.3), (0.15, 0.15, 0.8, 0.3, 0.7))
    thresholds = rates.cumsum() / rates.sum()
    density = rng.uniform((0.05, 0), (0.3, 0.3))
    while len(text.album.ids) < tokens:
        kind, left = int(np.searchsorted(thresholds, rng.random())), tokens - len(text.album.ids)
        if kind == 0:
            text.album.add_told(rng)
        elif kind == 1:
            text.album.add_rumour(rng)
        elif kind == 2 and size + 2 <= left:
            facts = min(int(rng.poisson(density[0] * size)), size)
            decoys = min(int(rng.poisson(density[1] * size)), size - facts)
            text.album.add_picture(rng, rows, columns, facts, decoys)
        elif kind == 3 and text.album.facts:
            known = list(text.album.facts)
            text.ask(known[rng.integers(len(known))])
        else:
            text.album.add_filler(rng, int(rng.integers(1, 10)))
    return text.cut(tokens)


def targets(texts: list[Text]) -> tuple[torch.Tensor, torch.Tensor]:
    """Next tokens (B, T) of texts of T + 1 tokens, and the weight of each: 1 for answers together, .3 for
    their ends, .1 for all other words; a place that a picture's token follows has none."""
    ids = torch.tensor([text.album.ids for text in texts])
    answer = torch.zeros(ids.shape, dtype=torch.bool)
    for row, text in enumerate(texts):
        answer[row, text.answers] = True
    answer, target = answer[:, 1:], ids[:, 1:]
    end = target == words.END
    rest = ~(answer | end | (target >= len(words.WORDS)))
    parts = ((1, answer), (0.3, end), (0.1, rest))
    return target, torch.stack([share * p / p.sum().clamp(min=1) for share, p in parts]).sum(0)
