"""Reference engine: any transformers model whose attention all goes through the registry, many texts at once.

The model is stock. Its attention function is replaced by one that keeps the entries of all layers itself, so
that every policy can see keys, gates and attention. It is plain where the wings are fast, and their oracle.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from ..core.checkpoint import GateCheckpoint
from ..core.config import EvictionConfig
from ..core.types import Floats
from ..errors import ConfigError, UnsupportedModelError
from .engine import CHUNK, Outcome, end_tokens, log_likelihoods, sample_score
from .looking import Entries, evict
from .methods import Method
from .samples import Question, Sample, Turn, text_score

IMPLEMENTATION = "kvret_reference"
OBSERVED = 32
_UNKNOWN = ("softcap", "s_aux", "position_bias", "sliding_window")
Looker = Callable[[int, torch.Tensor, Entries], None]


class ReferenceEngine:
    """Implements :class:`~mlx_kvret.evaluation.engine.Engine`.

    ``batch`` samples of equal shape are read side by side. The attention function of ``model`` is changed for
    good.

    Raises:
        UnsupportedModelError: some layers do not cache every token.
    """

    name = "reference"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any = None,
        chunk: int = CHUNK,
        buffer: int | None = None,
        batch: int = 1,
    ) -> None:
        from cuda_backend.modules import attention_modules, competing_layers

        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        self.chunk, self.buffer, self.batch = chunk, buffer, batch
        self.gates: Any = None
        self.reading: Reading | None = None
        modules = attention_modules(model)
        if competing_layers(model) != sorted(modules):
            raise UnsupportedModelError(
                f"{type(model).__name__} has layers that do not cache every token; the reference engine runs "
                "models with global attention only, use another backend"
            )
        model.set_attn_implementation(IMPLEMENTATION)
        for layer, index in enumerate(sorted(modules)):
            vars(modules[index])["_kvret_reference"] = (self, layer)
            modules[index].register_forward_pre_hook(self._observe, with_kwargs=True)

    def use_gates(self, gates: GateCheckpoint | nn.Module | None) -> None:
        """Score with other gates from now on: a checkpoint, or a module with ``log_beta(layer, x)``."""
        if isinstance(gates, GateCheckpoint):
            from cuda_backend.gates import from_checkpoint

            gates.check_model(self.model.config.to_dict())
            gates = from_checkpoint(gates).to(self.model.device)
        self.gates = gates

    def runs(self, method: Method) -> bool:
        return True

    def run(self, samples: Sequence[Sample], method: Method, budget: int) -> list[Outcome]:
        outcomes: dict[int, Outcome] = {}
        for places in batches(samples, self.batch):
            reading = self.open([samples[i] for i in places], method, budget)
            outcomes |= zip(places, reading.run(), strict=True)
        return [outcomes[i] for i in range(len(samples))]

    def open(self, samples: Sequence[Sample], method: Method, budget: int) -> Reading:
        """Samples of one shape, about to be read."""
        if method.learned and self.gates is None:
            raise ConfigError(f"method {method.name} needs gates; give some, or drop it")
        buffer = max(1, budget // 8) if self.buffer is None else self.buffer
        # gates of an experiment may be any module with log_beta
        config = None if method.full else method.eviction(budget, buffer, getattr(self.gates, "config", None))
        return Reading(self, samples, method, config)

    def _observe(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        assert self.reading is not None
        self.reading.inputs = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]


class Reading:
    """B samples being read: the entries of all layers, and the place in the text.

    ``look``, if set, is shown each layer's attention weights (B, H, G, queries, C) and the entries they fall
    on while questions are asked.
    """

    def __init__(
        self,
        engine: ReferenceEngine,
        samples: Sequence[Sample],
        method: Method,
        config: EvictionConfig | None,
    ) -> None:
        self.engine, self.samples, self.method, self.config = engine, samples, method, config
        self.seen, self.layers = 0, list[Entries]()
        self.look: Looker | None = None
        self.inputs = self._visible = torch.zeros(0)
        self._position = torch.zeros(0, dtype=torch.long)
        self._grown: list[Entries] = []
        self._paid: list[torch.Tensor] = []
        useful = torch.zeros(len(samples), max(sample.tokens for sample in samples), dtype=torch.bool)
        for row, sample in enumerate(samples):
            useful[row, list(sample.useful)] = True
        self._useful = useful.to(engine.model.device)

    def run(self) -> list[Outcome]:
        """Read every turn and ask its questions."""
        scores: list[list[float]] = [[] for _ in self.samples]
        likelihoods: list[list[Floats]] = [[] for _ in self.samples]
        for index in range(len(self.samples[0].turns)):
            turns = [sample.turns[index] for sample in self.samples]
            for row, found in self.read(turns):
                likelihoods[row].append(found)
            for row, answers in enumerate(self.ask([turn.questions for turn in turns])):
                scores[row] += answers
        heads = len(self.layers) * self.layers[0].valid.shape[1]
        held = torch.stack([entries.valid.flatten(1).sum(1) for entries in self.layers]).sum(0).tolist()
        return [
            Outcome(sample_score(answers, found), count / heads)
            for answers, found, count in zip(scores, likelihoods, held, strict=True)
        ]

    def read(self, turns: Sequence[Turn]) -> Iterator[tuple[int, Floats]]:
        """Take in a turn, evicting after each chunk; yields (row, log-likelihoods) if scored."""
        ids = torch.tensor([turn.ids for turn in turns], device=self._useful.device)
        scored, step = turns[0].scored, self.engine.chunk
        last: Any = [None] * len(turns)
        for start in range(0, ids.shape[1], step):
            part = ids[:, start : start + step]
            count = part.shape[1]
            causal = torch.ones(count, count, dtype=torch.bool, device=ids.device).tril()
            logits = self._forward(
                part, torch.arange(self.seen, self.seen + count), causal, everywhere=scored
            )
            if scored:
                for row, turn in enumerate(turns):
                    yield row, log_likelihoods(last[row], logits[row], turn.ids[start : start + step])
                last = logits[:, -1:]
            self._take_in(count)

    def _take_in(self, count: int) -> None:
        self.layers, self.seen = self._grown, self.seen + count
        if self.method.policy in ("h2o", "snapkv"):
            summed = self.method.policy == "h2o"
            self.layers = [
                dataclasses.replace(entries, attention=entries.attention * summed + paid)
                for entries, paid in zip(self.layers, self._paid, strict=True)
            ]
        if self.config:
            self.layers = evict(self.layers, self.method, self.config, self.seen, self._useful)

    def ask(self, questions: Sequence[Sequence[Question]]) -> list[list[float]]:
        """The score of every question of every sample: all are asked at once, each as if it were alone."""
        said = [[list(q.ids + q.answer[:-1]) for q in asked] for asked in questions]
        if not any(said):
            return [[] for _ in said]
        told = [[tuple[int, ...]()] * len(asked) for asked in questions]
        rounds = max(1 if q.metric == "exact" else q.max_tokens for asked in questions for q in asked)
        ends = end_tokens(self.engine.tokenizer) if rounds > 1 else set()
        open_ = {(row, i) for row, asked in enumerate(questions) for i in range(len(asked))}
        for _ in range(rounds):
            logits = self.follow(said)
            for row, i in sorted(open_):
                q, best = questions[row][i], logits[row, i, : len(said[row][i])].argmax(-1)
                if q.metric == "exact":
                    told[row][i] = tuple(best[len(q.ids) - 1 :].tolist())
                elif int(best[-1]) not in ends and len(told[row][i]) < q.max_tokens:
                    told[row][i] += (int(best[-1]),)
                    said[row][i].append(int(best[-1]))
                    continue
                open_.remove((row, i))
            if not open_:
                break
        return [
            [self._score(q, t) for q, t in zip(asked, answers, strict=True)]
            for asked, answers in zip(questions, told, strict=True)
        ]

    def _score(self, question: Question, told: tuple[int, ...]) -> float:
        if question.metric == "exact":
            return float(told == question.answer)
        return text_score(question, self.engine.tokenizer.decode(list(told)))

    def follow(self, continuations: Sequence[Sequence[Sequence[int]]]) -> Floats:
        """Logits (B, Q, n, words) of up to Q continuations of each text, none of which sees another.

        Shorter and missing ones are padded; their logits there mean nothing.
        """
        rows, many = len(continuations), max(map(len, continuations))
        longest = max(len(ids) for texts in continuations for ids in texts)
        ids = torch.zeros(rows, many, longest, dtype=torch.long)
        for row, texts in enumerate(continuations):
            for i, text in enumerate(texts):
                ids[row, i, : len(text)] = torch.tensor(text)
        causal = torch.ones(longest, longest, dtype=torch.bool, device=self._useful.device).tril()
        position = torch.arange(self.seen, self.seen + longest).repeat(many)
        apart = torch.block_diag(*[causal] * many)
        logits = self._forward(ids.flatten(1).to(self._useful.device), position, apart, everywhere=True)
        return logits.reshape(rows, many, longest, -1)

    @torch.no_grad()
    def _forward(
        self, ids: torch.Tensor, position: torch.Tensor, visible: torch.Tensor, everywhere: bool
    ) -> Floats:
        """Logits of ids (B, n), after each of them or the last; ``visible`` (n, n) among the new tokens."""
        self._position, self._visible = position.to(ids.device), visible
        self._grown, self._paid, self.engine.reading = [], [], self
        out = self.engine.model(
            input_ids=ids,
            position_ids=self._position[None],
            use_cache=False,
            logits_to_keep=0 if everywhere else 1,
        )
        self.engine.reading = None
        logits: Floats = out.logits.float().cpu().numpy()
        return logits

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Attention of new tokens to the layer's entries and to each other; (B, Hq, n, D) to the same."""
        texts, heads, count, _ = key.shape
        log_beta = torch.zeros(key.shape[:3], device=key.device)
        if self.method.learned:
            log_beta = self.engine.gates.log_beta(layer, self.inputs).transpose(1, 2)
        there = self._position.expand(texts, heads, count)
        new = Entries(key, value, log_beta, there, torch.zeros_like(log_beta), torch.ones_like(there).bool())
        entries = self.layers[layer].joined(new) if self.layers else new
        bias = torch.zeros_like(entries.log_beta).masked_fill_(~entries.valid, -torch.inf)
        split = query.reshape(texts * heads, -1, query.shape[-1])
        turned = entries.keys.flatten(0, 1).transpose(1, 2)
        logits = torch.baddbmm(bias.to(query.dtype).reshape(texts * heads, 1, -1), split, turned, alpha=scale)
        logits = logits.float().reshape(texts, heads, -1, count, entries.valid.shape[2])
        logits[..., -count:].masked_fill_(~self._visible, -torch.inf)
        weights = logits.softmax(-1)
        self._grown.append(entries)
        if self.method.policy in ("h2o", "snapkv"):
            observed = count if self.method.policy == "h2o" else OBSERVED
            self._paid.append(weights[..., -observed:, :].sum((2, 3)))
        if self.look:
            self.look(layer, weights, entries)
        out = weights.flatten(2, 3).to(value.dtype) @ entries.values
        return out.reshape(*query.shape[:3], -1)


def batches(samples: Sequence[Sample], size: int) -> list[list[int]]:
    """Places of samples that are read side by side: of equal shape, ``size`` at most."""
    by_shape: dict[Any, list[int]] = {}
    for place, sample in enumerate(samples):
        by_shape.setdefault(sample.shape, []).append(place)
    return [places[i : i + size] for places in by_shape.values() for i in range(0, len(places), size)]


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    if wrong := [name for name in _UNKNOWN if others.get(name) is not None]:
        raise UnsupportedModelError(
            f"{type(module).__name__} uses {', '.join(wrong)} in attention, which the reference engine does "
            "not follow; use another backend"
        )
    engine, layer = vars(module)["_kvret_reference"]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return engine.reading.attend(layer, query, key, value, scale).transpose(1, 2), None


def _no_mask(**_: Any) -> None:
    return None


AttentionInterface.register(IMPLEMENTATION, _attend)
AttentionMaskInterface.register(IMPLEMENTATION, _no_mask)
