"""The same tiny things on both backends, with one way to use each: what contracts are tested on."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
import torch
from cuda import tiny as on_torch
from mlx_backend import tiny as on_mlx

import mlx_kvret
from mlx_kvret.cuda_backend.cache import cache_argument

BACKENDS = ("mlx", "torch")
WORDS = 60


def ids(count: int, seed: int = 0) -> list[int]:
    """Random tokens that every tiny model knows."""
    return [int(token) for token in np.random.default_rng(seed).integers(1, WORDS, count)]


@dataclass(eq=False)
class Side:
    """A tiny model on one backend, attached, with random gates."""

    backend: str
    model: Any

    @classmethod
    def of(cls, backend: str, family: str = "qwen3", seed: int = 0, gate_seed: int = 1) -> Side:
        if backend == "mlx":
            model = mlx_kvret.attach(on_mlx.tiny(family, seed))
            gates = on_mlx.random_gates(on_mlx.shape_of(model), gate_seed)
        else:
            model = on_torch.tiny_model(family, seed)
            kinds = getattr(model.config, "layer_types", [""] * model.config.num_hidden_layers)
            gates = on_torch.checkpoint(
                model, sum(kind != "sliding_attention" for kind in kinds), seed=gate_seed
            )
        return cls(backend, mlx_kvret.attach(model, gates))

    def cache(self, **options: Any) -> Any:
        return mlx_kvret.make_cache(self.model, **options)

    def read(self, cache: Any, tokens: Sequence[int]) -> np.ndarray:
        """One forward pass, computed: logits (T, words)."""
        if self.backend == "mlx":
            logits = self.model(mx.array([list(tokens)]), cache=cache)
            mx.eval(logits)
            return np.array(logits[0].astype(mx.float32))
        with torch.no_grad():
            given = {} if cache is None else cache_argument(self.model, cache)
            return self.model(torch.tensor([list(tokens)]), **given).logits[0].float().numpy()

    def dense(self, tokens: Sequence[int]) -> np.ndarray:
        """Logits (T, words) of the stock model over a whole text."""
        return self.read(None, tokens)

    def logprobs(self, response: Any) -> np.ndarray:
        found = response.logprobs
        return np.array(found.astype(mx.float32)) if self.backend == "mlx" else found.float().numpy()

    def greedy(self, logprobs: Any) -> Any:
        return mx.argmax(logprobs, axis=-1) if self.backend == "mlx" else logprobs.argmax(-1)


def kept(cache: Any) -> list[list[list[int]]]:
    """Positions by layer and head."""
    return [[positions.tolist() for positions in layer] for layer in cache.kept_positions()]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def fork(cache: Any) -> Any:
    """A cache of its own with the same entries."""
    return copy.deepcopy(cache)


class Words:
    """A tokenizer whose text is numbers, with a begin token and, if wanted, an end."""

    bos_token, bos_token_id, chat_template = "<s>", 3, None
    clean_up_tokenization_spaces = False

    def __init__(self, end: int | None = None) -> None:
        self.eos_token_id = end

    def encode(self, text: str, add_special_tokens: bool = True, **_: Any) -> list[int]:
        return [3] * add_special_tokens + [int(word) for word in text.split() if word.isdigit()]

    def decode(self, tokens: Sequence[int], **_: Any) -> str:
        return "".join(f"{int(token)} " for token in tokens)

    def apply_chat_template(self, messages: Any) -> str:
        raise NotImplementedError("these tests give plain text")

    def get_vocab(self) -> dict[str, int]:
        return {}
