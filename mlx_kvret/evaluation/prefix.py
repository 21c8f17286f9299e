"""The beginning of texts, before anything is evicted: read once, whatever the policies that go on from there.

It would cost every policy the same; at half of a text's length it is half of the work.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from .attention_policies import Entries
from .methods import parse_method
from .reading import Engine, Reading
from .samples import Sample

# bytes of beginnings that are held at a time
ROOM = 2 << 30


class Prefix:
    """The state of a reading after ``tokens`` tokens of the first turn, as any policy would have it."""

    def __init__(self, engine: Engine, samples: Sequence[Sample], chunk: int, tokens: int) -> None:
        notes = ("attention", "queries", "inputs")
        found = Reading(engine, samples, parse_method("full"), None, chunk, notes=notes)
        turns = [sample.turns[0] for sample in samples]
        ids = torch.tensor([turn.ids[:tokens] for turn in turns], device=engine.model.device)
        sight = found.see(turns)
        for start in range(0, tokens, chunk):
            found.take_in(ids[:, start : start + chunk], turns[0].scored, sight, start)
        self._found = found

    @property
    def nbytes(self) -> int:
        held = [x for own in self._found.read_inputs for x in own]
        held += [x for entries in self._found.layers for x in (entries.keys, entries.values)]
        return sum(x.nbytes for x in held)

    def enter(self, reading: Reading) -> int:
        """Put a new reading there; returns the number of tokens."""
        found = self._found
        reading.seen, reading.nats, reading.last = found.seen, list(found.nats), found.last
        reading.queries, reading.scale = dict(found.queries), found.scale
        reading.layers = [self._layer(layer, reading) for layer in range(len(found.layers))]
        return found.seen

    def _layer(self, layer: int, reading: Reading) -> Entries:
        entries = self._found.layers[layer]
        if not reading.method.learned:
            return entries
        # chunk by chunk, as without a prefix, so that not a bit differs
        parts = [reading.engine.gates.log_beta(layer, x) for x in self._found.read_inputs[layer]]
        return dataclasses.replace(entries, log_beta=torch.cat(parts, 1).transpose(1, 2))
