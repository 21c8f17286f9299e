"""Texts being read by the reference engine, many at once: what is kept of them, scored and asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from ..core.config import EvictionConfig
from ..core.types import Floats
from ..errors import ConfigError
from .attention_policies import Entries, evict, is_due, observed
from .engine import Outcome, end_tokens, sample_score
from .likelihood import on_torch
from .methods import Method
from .samples import Question, Sample, Turn, text_score
from .sight import Sight, Sights

OBSERVED = 32
# what policies want to know of what was read: attention paid so far, the last queries
_NOTES = {"h2o": ("attention",), "snapkv": ("queries",)}
Looker = Callable[[int, torch.Tensor, Entries], None]


class Engine(Protocol):
    """Whose attention function asks a reading: a model, and the gates of learned policies."""

    model: Any
    tokenizer: Any
    gates: Any
    reading: Reading | None
    sights: Sights


class Beginning(Protocol):
    """The first tokens of a turn, read already."""

    def enter(self, reading: Reading) -> int:
        """Put a new reading behind them; returns their number."""


class Reading:
    """B samples being read: the entries of all layers, and the place in the text.

    ``prefix``, if given, is the beginning of the first turn, read already. ``look``, if set, is shown each
    layer's attention weights (B, H, G, queries, C) and the entries they fall on while questions are asked.
    ``nats`` are the negative log-likelihoods (B, n) of the tokens scored so far.
    """

    def __init__(
        self,
        engine: Engine,
        samples: Sequence[Sample],
        method: Method,
        config: EvictionConfig | None,
        chunk: int,
        prefix: Beginning | None = None,
        notes: Collection[str] | None = None,
    ) -> None:
        self.engine, self.samples, self.method, self.config = engine, samples, method, config
        self.chunk, self.prefix = chunk, prefix
        self._notes = _NOTES.get(method.policy, ()) if notes is None else notes
        self.read_inputs: list[list[torch.Tensor]] = []
        self.seen, self.layers = 0, list[Entries]()
        # rotary positions may lag behind the tokens seen where there are pictures
        self.lag = torch.zeros(len(samples), 1, dtype=torch.long, device=engine.model.device)
        self.queries: dict[int, torch.Tensor] = {}
        self.scale = 1.0
        self.nats = list[Floats]()
        self.last: torch.Tensor | None = None
        self.look: Looker | None = None
        self.inputs = torch.zeros(0)
        self._reads = False
        self._base = list[Entries]()
        self._visible, self._position = torch.zeros(0), torch.zeros(0, dtype=torch.long)
        self._grown: list[Entries] = []
        useful = torch.zeros(len(samples), max(sample.tokens for sample in samples), dtype=torch.bool)
        for row, sample in enumerate(samples):
            useful[row, list(sample.useful)] = True
        self._useful = useful.to(engine.model.device)
        self._pictured = torch.zeros_like(self._useful)

    def run(self) -> list[Outcome]:
        """Read every turn and ask its questions."""
        scores: list[list[float]] = [[] for _ in self.samples]
        for index in range(len(self.samples[0].turns)):
            turns = [sample.turns[index] for sample in self.samples]
            self.read(turns)
            for row, answers in enumerate(self.ask([turn.questions for turn in turns])):
                scores[row] += answers
        likelihoods = -np.concatenate(self.nats, 1) if self.nats else None
        heads = len(self.layers) * self.layers[0].valid.shape[1]
        held = torch.stack([entries.valid.flatten(1).sum(1) for entries in self.layers]).sum(0).tolist()
        return [
            Outcome(sample_score(answers, [] if likelihoods is None else [likelihoods[row]]), count / heads)
            for row, (answers, count) in enumerate(zip(scores, held, strict=True))
        ]

    def read(self, turns: Sequence[Turn]) -> None:
        """Take in a turn, evicting after each chunk."""
        ids = torch.tensor([turn.ids for turn in turns], device=self._useful.device)
        scored, start, sight = turns[0].scored, 0, self.see(turns)
        if self.prefix is not None and self.seen == 0:
            start = self.prefix.enter(self)
            self._evict()
        for first in range(start, ids.shape[1], self.chunk):
            self.take_in(ids[:, first : first + self.chunk], scored, sight, first)
            self._evict()
        self.saw(sight, ids.shape[1])

    def see(self, turns: Sequence[Turn]) -> Sight | None:
        """Look at the pictures of turns that are about to be read."""
        sight = self.engine.sights(turns)
        if sight is not None:
            if turns[0].scored:
                raise ConfigError(
                    "a text whose tokens are scored has pictures; only questions on pictures are scored"
                )
            self._pictured[:, self.seen : self.seen + len(turns[0].ids)] = sight.pictured
        return sight

    def saw(self, sight: Sight | None, tokens: int) -> None:
        """A turn of so many tokens has been read: what follows counts on from its last position."""
        if sight is not None:
            self.lag = self.lag + tokens - sight.next_position

    def take_in(self, ids: torch.Tensor, scored: bool, sight: Sight | None = None, first: int = 0) -> None:
        """One forward pass (B, n), nothing evicted; from token ``first`` on in a turn with a ``sight``."""
        count = ids.shape[1]
        causal = torch.ones(count, count, dtype=torch.bool, device=ids.device).tril()
        position = torch.arange(self.seen, self.seen + count, device=ids.device)
        self._reads = True
        ahead = self.seen - first - self.lag
        given = None if sight is None else sight.part(first, first + count, ahead)
        logits = self.forward(ids, position[None], causal[None], self.layers, 0 if scored else 1, given)
        self._reads = False
        if scored:
            self.nats.append(on_torch(self.last, logits, ids.tolist()))
        self.last = logits[:, -1:].clone() if scored else None
        self.layers, self.seen = self._grown, self.seen + count

    def _evict(self) -> None:
        if self.config is None or not is_due(self.layers, self.config):
            return
        layers = self.layers
        if self.method.policy == "snapkv":
            layers = [dataclasses.replace(e, attention=self.observed(i)) for i, e in enumerate(layers)]
        self.layers = evict(layers, self.method, self.config, self.seen, self._useful, self._pictured)

    def observed(self, layer: int) -> torch.Tensor:
        """What the last queries of the text pay to each of a layer's entries, (B, H, C)."""
        return observed(self.queries[layer], self.layers[layer], self.seen, self.scale)

    def ask(self, questions: Sequence[Sequence[Question]]) -> list[list[float]]:
        """The score of every question of every sample: all are asked at once, each as if it were alone."""
        new = [[list(q.ids + q.answer[:-1]) for q in asked] for asked in questions]
        if not any(new):
            return [[] for _ in new]
        told = [[tuple[int, ...]()] * len(asked) for asked in questions]
        rounds = max(1 if q.metric == "exact" else q.max_tokens for asked in questions for q in asked)
        ends = end_tokens(self.engine.tokenizer) if rounds > 1 else set()
        open_ = {(row, i) for row, asked in enumerate(questions) for i in range(len(asked))}
        going = Continuation(self, new)
        for _ in range(rounds):
            best = going.follow(new).argmax(-1).cpu()
            said, new = new, [[[] for _ in asked] for asked in questions]
            for row, i in sorted(open_):
                q, own = questions[row][i], best[row, i, : len(said[row][i])].tolist()
                if q.metric == "exact":
                    told[row][i] = tuple(own[len(q.ids) - 1 :])
                elif own[-1] not in ends and len(told[row][i]) < q.max_tokens:
                    told[row][i] += (own[-1],)
                    new[row][i].append(own[-1])
                    continue
                open_.remove((row, i))
            if not open_:
                break
        return [
            [self._answered(q, t) for q, t in zip(asked, answers, strict=True)]
            for asked, answers in zip(questions, told, strict=True)
        ]

    def _answered(self, question: Question, told: tuple[int, ...]) -> float:
        if question.metric == "exact":
            return float(told == question.answer)
        return text_score(question, self.engine.tokenizer.decode(list(told)))

    def follow(self, continuations: Sequence[Sequence[Sequence[int]]]) -> Floats:
        """Logits (B, Q, n, words) of up to Q continuations of each text, none of which sees another.

        Shorter and missing ones are padded; their logits there mean nothing.
        """
        logits: Floats = Continuation(self, continuations).follow(continuations).float().cpu().numpy()
        return logits

    @torch.no_grad()
    def forward(
        self,
        ids: torch.Tensor,
        position: torch.Tensor,
        visible: torch.Tensor,
        base: list[Entries],
        last: int,
        given: dict[str, Any] | None = None,
    ) -> torch.Tensor:
        """Logits of new tokens ids (B, n), the ``last`` of them (0: all); :attr:`grown` has their entries.

        ``position`` (B or 1, n); ``visible`` (B or 1, n, m) tells which of the last m entries each sees, of
        ``base`` and then its own; older ones are all visible. ``given`` are the decoder's arguments where
        there are pictures; the logits mean nothing then.
        """
        self._position, self._visible, self._base, self._grown = position, visible, base, []
        self.engine.reading = self
        try:
            if given is not None:
                hidden: torch.Tensor = self.engine.model.get_decoder()(use_cache=False, **given)[0]
                return hidden
            out = self.engine.model(
                input_ids=ids, position_ids=position - self.lag, use_cache=False, logits_to_keep=last
            )
        finally:
            self.engine.reading = None
        logits: torch.Tensor = out.logits
        return logits

    @property
    def grown(self) -> list[Entries]:
        """The base of the last :meth:`forward` and its new entries."""
        return self._grown

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Attention of new tokens to the layer's entries and to each other; (B, Hq, n, D) to the same."""
        texts, heads, count, _ = key.shape
        log_beta = torch.zeros(key.shape[:3], device=key.device)
        if self.method.learned and self._reads:
            log_beta = self.engine.gates.log_beta(layer, self.inputs).transpose(1, 2)
        there = self._position[:, None].expand(texts, heads, count)
        new = Entries(key, value, log_beta, there, torch.zeros_like(log_beta), torch.ones_like(there).bool())
        entries = self._base[layer].joined(new) if self._base else new
        bias = torch.zeros_like(entries.log_beta).masked_fill_(~entries.valid, -torch.inf)
        split = query.reshape(texts * heads, -1, query.shape[-1])
        turned = entries.keys.flatten(0, 1).transpose(1, 2)
        logits = torch.baddbmm(bias.to(query.dtype).reshape(texts * heads, 1, -1), split, turned, alpha=scale)
        logits = logits.float().reshape(texts, heads, -1, count, entries.valid.shape[2])
        logits[..., -self._visible.shape[-1] :].masked_fill_(~self._visible[:, None, None], -torch.inf)
        weights = logits.softmax(-1)
        if self._reads:
            entries = self._note(layer, query, weights, entries, scale)
        elif self.look:
            self.look(layer, weights, entries)
        self._grown.append(entries)
        out = weights.flatten(2, 3).to(value.dtype) @ entries.values
        return out.reshape(*query.shape[:3], -1)

    def _note(
        self, layer: int, query: torch.Tensor, weights: torch.Tensor, entries: Entries, scale: float
    ) -> Entries:
        """What the policy, or any policy, will want to know."""
        if "inputs" in self._notes:
            if len(self.read_inputs) == layer:
                self.read_inputs.append([])
            self.read_inputs[layer].append(self.inputs)
        if "queries" in self._notes:
            before = [self.queries[layer]] if layer in self.queries else []
            self.queries[layer] = torch.cat([*before, query], 2)[:, :, -OBSERVED:]
            self.scale = scale
        if "attention" in self._notes:
            entries = dataclasses.replace(entries, attention=entries.attention + weights.sum((2, 3)))
        return entries


class Continuation:
    """Texts that go on from a reading, side by side, each as if it were alone; nothing is evicted.

    Every call of :meth:`follow` goes on where the last one stopped: a generated token costs one token.
    """

    def __init__(self, reading: Reading, continuations: Sequence[Sequence[Any]]) -> None:
        rows, self._many = len(continuations), max(map(len, continuations))
        self._reading, self._entries = reading, reading.layers
        self._device = reading.layers[0].keys.device
        self._length = torch.zeros(rows, self._many, dtype=torch.long)
        # of each entry so far: which continuation it belongs to, its place there, and whether it is padding
        self._owner = torch.zeros(0, dtype=torch.long)
        self._place = torch.zeros(rows, 0, dtype=torch.long)
        self._real = torch.zeros(rows, 0, dtype=torch.bool)

    def follow(self, continuations: Sequence[Sequence[Sequence[int]]]) -> torch.Tensor:
        """Logits (B, Q, n, words) of more tokens of each continuation; none for those that have ended.

        Shorter and missing ones are padded; their logits there mean nothing.
        """
        rows, many = len(continuations), self._many
        width = max(len(ids) for texts in continuations for ids in texts)
        ids, real = torch.zeros(2, rows, many, width, dtype=torch.long)
        for row, texts in enumerate(continuations):
            for i, text in enumerate(texts):
                ids[row, i, : len(text)], real[row, i, : len(text)] = torch.tensor(text), 1
        place = (self._length[:, :, None] + torch.arange(width)).flatten(1)
        owner = torch.arange(many).repeat_interleave(width)
        self._length += real.sum(2)
        before = len(self._owner)
        self._owner = torch.cat([self._owner, owner])
        self._place = torch.cat([self._place, place], 1)
        self._real = torch.cat([self._real, real.flatten(1).bool()], 1)
        itself = torch.arange(before, before + many * width)[:, None] == torch.arange(len(self._owner))
        earlier = self._place[:, None] <= place[:, :, None]
        own = (owner[:, None] == self._owner) & earlier & self._real[:, None]
        visible = (own | itself).to(self._device)
        position = (self._reading.seen + place).to(self._device)
        logits = self._reading.forward(ids.flatten(1).to(self._device), position, visible, self._entries, 0)
        self._entries = self._reading.grown
        return logits.reshape(rows, many, width, -1)
