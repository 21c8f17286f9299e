"""Continuous batching: rows join, decode together and leave, each within a budget of its own.

The interface is that of mlx-lm's class of this name, so that one loop drives either backend. A row of a batch
is treated as it would be alone; a step of many rows costs little more than that of one.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from mlx_kvret.core.options import whole
from mlx_kvret.core.prompts import check_ids
from mlx_kvret.errors import ConfigError, UnsupportedFeatureError

from . import hooks
from .attaching import make_cache
from .cache import BoundedCache, cache_argument
from .generation import Processor, vocabulary
from .prompt import Group, Prompt, PromptResponse, Response
from .ranks import together
from .sampling import Sampler
from .step import Step, decoder_step
from .tokens import Told

Tokens = Sequence[int]
# tokens (R,) and their log probabilities (R, V)
_Chosen = tuple[torch.Tensor, torch.Tensor]


class BatchGenerator:
    """Answers to many prompts: each step decodes all rows once, then reads a chunk of those that wait.

    Args:
        max_tokens: of each answer, unless :meth:`insert` says otherwise.
        stop_tokens: token sequences that end an answer.
        sampler: log probabilities (n, V) to tokens (n,); the likeliest unless given.
        logits_processors: as of :func:`mlx_kvret.stream_generate`.
        completion_batch_size: most rows that decode together; ``prefill_batch_size``: most prompts that are
            read together, ``prefill_step_size`` tokens of each at a time.

    Caches that are given out stand beside the rows in the same arrays, so that they belong to the same
    thread; ``copy.deepcopy`` has arrays of its own. A step that fails, or is broken off, changes nothing.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        max_tokens: int = 128,
        stop_tokens: Sequence[Tokens] | None = None,
        sampler: Sampler | None = None,
        logits_processors: Sequence[Processor] | None = None,
        completion_batch_size: int = 32,
        prefill_batch_size: int = 8,
        prefill_step_size: int = 2048,
    ) -> None:
        sizes = {"completion_batch_size": completion_batch_size, "prefill_batch_size": prefill_batch_size}
        for name, value in {
            **sizes,
            "prefill_step_size": prefill_step_size,
            "max_tokens": max_tokens,
        }.items():
            whole(name, value, 1)
        self._model, self._given = model, (max_tokens, sampler, tuple(logits_processors or ()))
        self._stops = _stops(stop_tokens)
        self._most = max(completion_batch_size, prefill_batch_size)
        self._prompts, self._chunk = prefill_batch_size, prefill_step_size
        self._waiting = deque[Prompt]()
        self._reading: Group | None = None
        self._decoding: Group | None = None
        # of the rows that decode: the next tokens, and those read already of which nobody was told
        self._next: _Chosen | None = None
        self._said: _Chosen | None = None
        self._uids = 0
        # how the tokens that were said last are asked for, if no row has left since
        self._told = Told(model.device)
        self._turn: int | None = None
        self._step: Step | None = None

    def insert(
        self,
        prompts: Sequence[Tokens],
        max_tokens: Sequence[int] | None = None,
        caches: Sequence[BoundedCache | None] | None = None,
        all_tokens: Sequence[Tokens] | None = None,
        samplers: Sequence[Sampler | None] | None = None,
        logits_processors: Sequence[Sequence[Processor] | None] | None = None,
        stop_sequences: Sequence[Sequence[Tokens] | None] | None = None,
    ) -> list[int]:
        """Have prompts, of token ids each, wait for their turn; returns a number for each of them.

        Args:
            caches: what is read before each prompt, of one sequence; they stay as they are.
            all_tokens: the tokens that those hold.
            max_tokens, samplers, logits_processors, stop_sequences: of each prompt, None as of all.

        Raises:
            ConfigError: a prompt is empty or has unknown tokens, or there is not one value for each.
            ModelMismatchError: a cache belongs to another model.
        """
        count = len(prompts)
        most, sampler, processors = self._given
        columns: dict[str, Any] = {
            "max_tokens": max_tokens,
            "caches": caches,
            "all_tokens": all_tokens,
            "samplers": samplers,
            "logits_processors": logits_processors,
            "stop_sequences": stop_sequences,
        }
        for name, values in columns.items():
            if values is not None and len(values) != count:
                raise ConfigError(f"{name} has {len(values)} values for {count} prompts; give one each")
        made = []
        for at, prompt in enumerate(prompts):
            own = {name: None if values is None else values[at] for name, values in columns.items()}
            if not len(prompt):
                raise ConfigError(f"prompt {at} is empty; give at least one token")
            check_ids(prompt, vocabulary(self._model))
            limit = most if own["max_tokens"] is None else own["max_tokens"]
            whole("max_tokens", limit, 1)
            cache = own["caches"]
            made.append(
                Prompt(
                    uid=self._uids + at,
                    prompt=list(map(int, prompt)),
                    total=len(prompt),
                    tokens=list(own["all_tokens"] or ()),
                    most=limit,
                    sampler=own["samplers"] or sampler,
                    processors=tuple(own["logits_processors"] or processors),
                    stops=self._stops if own["stop_sequences"] is None else _stops(own["stop_sequences"]),
                    cache=make_cache(self._model) if cache is None else _single(self._model, cache),
                )
            )
        self._prepare([one.cache for one in made if one.cache is not None])
        self._waiting.extend(made)
        self._uids += count
        return [one.uid for one in made]

    def _prepare(self, caches: list[BoundedCache]) -> None:
        """Have rows of such caches fit into the batch, a new one if nobody is in the old one."""
        if self._waiting or any(group.sequences for group in self._groups):
            fresh = self._groups[0].cache
        elif caches:
            fresh = copy.deepcopy(caches[0])
            fresh.check_clocks()
            fresh.filter([])
            reading, decoding = Group(fresh), Group(fresh.copy())
            step = decoder_step(self._model, decoding.cache)
            vars(self).update(_reading=reading, _decoding=decoding, _step=step, _next=None, _said=None)
        for cache in caches:
            fresh.check_joins(cache)

    @property
    def _groups(self) -> list[Group]:
        return [group for group in (self._reading, self._decoding) if group is not None]

    @torch.no_grad()
    def next(self) -> tuple[list[PromptResponse], list[Response]]:
        """One step: a token for each row that decodes, and more of the prompts."""
        if self._reading is None or self._decoding is None:
            return [], []
        given = self._decode(self._decoding) if self._decoding.sequences else []
        room = self._most - len(self._decoding.sequences)
        if room <= 0:
            return [], given
        self._admit(self._reading, min(room, self._prompts) - len(self._reading.sequences))
        return [*self._start(self._reading, self._decoding), *self._read(self._reading)], given

    def next_generated(self) -> list[Response]:
        """Steps until there are tokens; none if nothing is left to do."""
        while True:
            read, given = self.next()
            if given or not read:
                return given

    def remove(
        self, uids: Sequence[int], return_prompt_caches: bool = False
    ) -> dict[int, tuple[BoundedCache | None, list[int]]]:
        """Have rows or waiting prompts end; their caches and what these hold, if asked for."""
        found = self.extract_cache(uids) if return_prompt_caches else {}
        gone = set(uids)
        self._waiting = deque(one for one in self._waiting if one.uid not in gone)
        for group in self._groups:
            keep = [at for at, one in enumerate(group.sequences) if one.uid not in gone]
            self._keep(group, keep)
        return found

    def extract_cache(self, uids: Sequence[int]) -> dict[int, tuple[BoundedCache | None, list[int]]]:
        """Caches of rows as they are, and what they hold; None where nothing is read yet."""
        wanted = set(uids)
        found = {one.uid: (one.cache, one.tokens) for one in self._waiting if one.uid in wanted}
        for group in self._groups:
            for at, one in enumerate(group.sequences):
                if one.uid in wanted:
                    found[one.uid] = group.cache.row(at), list(one.tokens)
        return found

    @property
    def prompt_cache_nbytes(self) -> int:
        """Bytes of all rows."""
        waiting = [one.cache for one in self._waiting if one.cache is not None]
        return sum(cache.nbytes for cache in (*waiting, *(group.cache for group in self._groups)))

    def close(self) -> None:
        """All rows end."""
        self._waiting.clear()
        for group in self._groups:
            self._keep(group, [])

    # ------------------------------------------------------------------ the parts of a step

    def _decode(self, group: Group) -> list[Response]:
        """Read every row's next token, choose the one after, and then look at the one that was read."""
        if self._said is None:
            assert self._next is not None
            said = self._next
            assert self._step is not None
            turn = self._told.ask(said[0])
            following = self._step(said[0][:, None], partial(self._chosen, group.sequences, said[0]))
            vars(self).update(_next=following, _said=said, _turn=turn)
        assert self._said is not None
        (tokens, logprobs), responses, keep = self._said, [], []
        with together(group.cache.share, "the next tokens"):
            values = tokens.tolist() if self._turn is None else self._told.get(self._turn, len(tokens))
        for at, (one, value) in enumerate(zip(group.sequences, values, strict=True)):
            one.tokens.append(value)
            one.count += 1
            made = Response(one.uid, value, logprobs[at], one.reason())
            if made.finish_reason is None:
                keep.append(at)
            else:
                made.prompt_cache, made.all_tokens = group.cache.row(at), one.tokens
            responses.append(made)
        self._said = None
        self._keep(group, keep)
        return responses

    def _keep(self, group: Group, keep: list[int]) -> None:
        """Have all others end."""
        if len(keep) == len(group.sequences):
            return
        group.cache.filter(keep)
        group.sequences = [group.sequences[at] for at in keep]
        if group is self._decoding:
            if self._step is not None and not keep:
                self._step.release()
            self._turn = None
            held = {"_next": self._next, "_said": self._said}
            vars(self).update({n: None if a is None else (a[0][keep], a[1][keep]) for n, a in held.items()})

    def _admit(self, group: Group, count: int) -> None:
        """Have the next ``count`` prompts, or all there are, stand in the batch."""
        count = min(count, len(self._waiting))
        if count > 0:
            group.cache.reserve(count)
        for _ in range(count):
            one = self._waiting[0]
            assert one.cache is not None
            # what was given stays as it is
            group.cache.extend(one.cache.copy())
            one.cache = None
            group.sequences.append(self._waiting.popleft())

    def _start(self, group: Group, decoding: Group) -> list[PromptResponse]:
        """Prompts of which one token is left read it, and decode from the next step on."""
        which = [at for at, one in enumerate(group.sequences) if len(one.prompt) == 1]
        if not which:
            return []
        counts = [int(len(one.prompt) == 1) for one in group.sequences]
        last = torch.tensor([one.prompt[0] for one in group.sequences], device=self._model.device)
        group.cache.prepare(counts)
        tokens, logprobs = self._pass(group, last[:, None], which, last[which])
        ready = group.split(which)
        for one in ready.sequences:
            one.tokens += one.prompt
        decoding.extend(ready)
        if self._next is not None:
            tokens, logprobs = torch.cat([self._next[0], tokens]), torch.cat([self._next[1], logprobs])
        self._next = tokens, logprobs
        return [PromptResponse(one.uid, (one.total, one.total), True, True) for one in ready.sequences]

    def _read(self, group: Group) -> list[PromptResponse]:
        """A chunk of each prompt, all but its last token."""
        if not group.sequences:
            return []
        chunks = [one.prompt[: min(len(one.prompt) - 1, self._chunk)] for one in group.sequences]
        most = max(map(len, chunks))
        ids = torch.tensor([[*chunk, *[0] * (most - len(chunk))] for chunk in chunks])
        group.cache.prepare(list(map(len, chunks)))
        self._model(ids.to(self._model.device), **cache_argument(self._model, group.cache), logits_to_keep=1)
        for one, chunk in zip(group.sequences, chunks, strict=True):
            one.tokens += chunk
            one.prompt = one.prompt[len(chunk) :]
        read = ((one.uid, one.total - len(one.prompt), one.total) for one in group.sequences)
        return [PromptResponse(uid, (done, total), False, False) for uid, done, total in read]

    def _pass(self, group: Group, ids: torch.Tensor, which: list[int], tokens: torch.Tensor) -> _Chosen:
        """One pass over ids (R, 1), and what comes after ``tokens`` of the rows ``which``: all or nothing."""

        def forward() -> _Chosen:
            logits = self._model(ids, **cache_argument(self._model, group.cache)).logits[:, -1]
            return self._chosen([group.sequences[at] for at in which], tokens, logits[which])

        chosen: _Chosen = group.cache.run(forward)
        return chosen

    def _chosen(self, sequences: list[Prompt], tokens: torch.Tensor, logits: torch.Tensor) -> _Chosen:
        """What comes after ``tokens`` (R,), with logits (R, V); rows of one sampler choose at once."""
        if any(one.processors for one in sequences):
            # processors may keep what they are given
            rows = zip(sequences, tokens, logits.clone().split(1), strict=True)
            logits = torch.cat([_processed(*row) for row in rows])
        logprobs = logits.float().log_softmax(-1)
        samplers = [one.sampler for one in sequences]
        if all(sampler is samplers[0] for sampler in samplers):
            return _sampled(samplers[0], logprobs), logprobs
        chosen = [_sampled(*row) for row in zip(samplers, logprobs.split(1), strict=True)]
        return torch.cat(chosen), logprobs


def _sampled(sampler: Sampler | None, logprobs: torch.Tensor) -> torch.Tensor:
    return logprobs.argmax(-1) if sampler is None else sampler(logprobs)


def _processed(one: Prompt, token: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    if one.processors:
        ids = torch.tensor([[*one.tokens, int(token)]], device=logits.device)
        for process in one.processors:
            logits = process(ids, logits)
    return logits


def _stops(stops: Sequence[Tokens] | None) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(map(int, stop)) for stop in stops or () if len(stop))


def _single(model: PreTrainedModel, cache: BoundedCache) -> BoundedCache:
    """A cache of one sequence that the model can go on with."""
    hooks.check_cache(model, cache)
    if cache.rows != 1:
        raise ConfigError(f"a cache holds {cache.rows} sequences; give one for each prompt (cache.row(i))")
    if cache.shared is None:
        raise UnsupportedFeatureError(
            "a cache of policy 'full' cannot stand in a batch; choose another policy or a larger budget"
        )
    return cache
