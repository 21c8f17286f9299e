"""Serving on torch."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from mlx_kvret.cuda_backend import hooks, snapshots
from mlx_kvret.cuda_backend.api import competing, processed
from mlx_kvret.cuda_backend.attaching import make_cache
from mlx_kvret.cuda_backend.attachment import attachment
from mlx_kvret.cuda_backend.batch import BatchGenerator
from mlx_kvret.cuda_backend.cache import BoundedCache, cache_argument
from mlx_kvret.cuda_backend.generation import stop_tokens, vocabulary
from mlx_kvret.cuda_backend.memory import free_bytes
from mlx_kvret.cuda_backend.sampling import alone, of_first
from mlx_kvret.cuda_backend.seeing import Seen, taken
from mlx_kvret.cuda_backend.step import decoder_step

from ..core.installed import command_for, installed
from ..core.picture_prompts import processor_of
from ..core.types import Array
from ..errors import UnsupportedFeatureError
from .channels import Plain, Splitter
from .common import Common, Rooms
from .failures import Refusal


class OnTorch(Common):
    """As :class:`.backend.Backend`."""

    def __init__(self, model: Any, tokenizer: Any, options: dict[str, Any]) -> None:
        draw = alone, of_first, greedy
        rooms = Rooms(hooks, snapshots, make_cache, competing, vocabulary, BatchGenerator, *draw, _batches)
        super().__init__(rooms, model, options)
        self.ends = frozenset(stop_tokens(model, tokenizer))
        self._processor, attached = processor_of(tokenizer), attachment(model)
        eyes = None if attached is None or self._processor is tokenizer else attached.eyes
        self.eyes = frozenset() if eyes is None else eyes.tokens
        self._tokenizer = tokenizer
        self._marks: Any = importlib.import_module("mlx_kvret.serving.marks") if installed("mlx") else None

    @functools.cached_property
    def _speaker(self) -> Any:
        """mlx-lm's wrapper of the tokenizer, which knows its thoughts and tool calls; None without mlx-lm."""
        return None if self._marks is None else self._marks.wrapped(self._tokenizer)

    @torch.no_grad()
    def read(self, cache: BoundedCache, ids: list[int]) -> None:
        given = torch.tensor([ids], device=self.model.device)
        self.model(given, **cache_argument(self.model, cache), logits_to_keep=1)

    def processed(self, text: str, pictures: list[Any]) -> dict[str, Any]:
        return processed(self.model, self._processor, text, pictures)

    def looking(self, cache: BoundedCache, made: dict[str, Any], chunk: int) -> Iterator[int]:
        return Seen(self.model, taken(self.model, made)).chunks(cache, chunk)

    def decoder(self, cache: BoundedCache) -> Callable[[torch.Tensor], torch.Tensor]:
        step = decoder_step(self.model, cache)
        return lambda token: step(token[:, None], _logprobs)

    def host(self, logprobs: torch.Tensor) -> Array:
        return logprobs.float().cpu().numpy()

    def array(self, token: int) -> torch.Tensor:
        return torch.tensor([token], device=self.model.device)

    def splitter(self, tokenizer: Any, ids: list[int], tools: list[dict[str, Any]] | None) -> Splitter:
        if self._speaker is None:
            if tools:
                raise Refusal(
                    400,
                    "tool calls are found by mlx-lm's parsers, which are not installed here "
                    f"({command_for('mlx')}); drop tools",
                    param="tools",
                )
            return Plain()
        found: Splitter = self._marks.splitter(self._speaker, ids, tools)
        return found

    def free_bytes(self) -> int | None:
        return free_bytes(self.model.device)


def _batches(cache: BoundedCache) -> bool:
    try:
        cache.check_clocks()
    except UnsupportedFeatureError:
        return False
    return True


def _logprobs(logits: torch.Tensor) -> torch.Tensor:
    return logits.float().log_softmax(-1)


def greedy(logprobs: torch.Tensor) -> torch.Tensor:
    return logprobs.argmax(-1)
