"""What the torch backend's benchmarks compare: ragged layers, random models, bounded caches and full ones.

Caches are handed to models by one helper, whatever the release of transformers calls them, and whether they
were used is looked at. A step is a function from tokens (R, 1) to logits (R, V).
"""

from __future__ import annotations

import gc
import importlib.util
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from gpu_timing import DEVICE, DTYPE, GPU, synchronize
from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM, StaticCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from mlx_kvret.core.config import EvictionConfig, GateConfig
from mlx_kvret.cuda_backend import hooks
from mlx_kvret.cuda_backend.cache import BoundedCache, cache_argument
from mlx_kvret.cuda_backend.gates import RetentionGates
from mlx_kvret.cuda_backend.pool import Pool, listing
from mlx_kvret.cuda_backend.recording import Called, Graph
from mlx_kvret.cuda_backend.step import FixedStep, PlainStep
from mlx_kvret.cuda_backend.view import LayerView, Places

Step = Callable[[torch.Tensor], torch.Tensor]
QWEN3 = {
    "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
    "vocab_size": 151936,
}  # fmt: skip
SIZES = {
    "4B": QWEN3 | {"hidden_size": 2560, "intermediate_size": 9728, "tie_word_embeddings": True},
    "8B": QWEN3 | {"hidden_size": 4096, "intermediate_size": 12288},
    "tiny": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 300},
}  # fmt: skip


def flashinfer_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **options: Any
) -> tuple[torch.Tensor, None]:
    """FlashInfer's decoding, a sequence at a time; torch's SDPA for prompts."""
    if query.shape[2] > 1:
        return sdpa_attention_forward(module, query, key, value, mask, **options)
    from flashinfer import single_decode_with_kv_cache

    scale = options.get("scaling")
    rows = [
        single_decode_with_kv_cache(q[:, 0], k, v, kv_layout="HND", sm_scale=scale)
        for q, k, v in zip(query, key, value, strict=True)
    ]
    return torch.stack(rows)[:, None], None


AttentionInterface.register("FlashInfer", flashinfer_attention)
AttentionMaskInterface.register("FlashInfer", sdpa_mask)


# ---------------------------------------------------------------- one layer


def ragged_view(lengths: list[int], window: int, dim: int, rows: int = 1, seed: int = 0) -> LayerView:
    """A layer of R rows whose heads hold that many entries each, scattered, and ``window`` newest tokens."""
    torch.manual_seed(seed)
    heads, total = len(lengths), sum(lengths)
    pool = Pool(rows, 1, heads, DEVICE)
    keys, values = torch.randn(2, rows, heads, window, dim, device=DEVICE, dtype=DTYPE)
    pool.grow(-(-total // heads), keys, values)
    flat = torch.arange(heads).repeat_interleave(torch.tensor(lengths))
    for index in range(rows):
        slab = pool.slab(index)
        owner = flat[torch.randperm(total)]
        slab.owner[:total] = owner.to(DEVICE, torch.int32)
        table, offsets = listing(slab.owner[None], heads, len(slab.table))
        pool.take({"table": table, "offsets": offsets}, [index])
    pool.keys.normal_()
    pool.values.normal_()
    if rows == 1:
        return LayerView(pool, 0, 0, keys, values)
    clocks = [[n] * rows for n in (window - 1, window, 0, 9, 9)]
    numbers = torch.tensor([list(range(rows)), *clocks])
    return LayerView(pool, 0, 0, keys, values, Places(pool, numbers, DEVICE))


def shares(kept: int, heads: int) -> dict[str, list[int]]:
    """The same number of entries in all, even over the heads or 20 times as many in one as in the others."""
    small = max(1, kept * heads // (heads + 19))
    return {"balanced": [kept] * heads, "20:1": [kept * heads - small * (heads - 1)] + [small] * (heads - 1)}


# ---------------------------------------------------------------- models


def build(size: str, dtype: torch.dtype = DTYPE) -> tuple[Any, hooks.Attachment]:
    """A random model with random gates whose log β spreads from head to head."""
    torch.manual_seed(0)
    config = Qwen3Config(**SIZES[size], max_position_embeddings=1 << 18, dtype=dtype, eos_token_id=None)
    with torch.device(DEVICE):
        model: Any = Qwen3ForCausalLM._from_config(config, dtype=dtype).eval().requires_grad_(False)
        shape = GateConfig("rg10", config.num_hidden_layers, config.num_key_value_heads, config.hidden_size)
        gates = RetentionGates(shape).requires_grad_(False).to(dtype)
        gates.shared.bias.data = torch.linspace(4.0, 8.0, config.num_key_value_heads, dtype=dtype)
    model.generation_config.eos_token_id = None
    return model, hooks.install(model, gates, {"model": "", "gates": ""})


@contextmanager
def stock(model: Any, attention: str = "sdpa") -> Iterator[None]:
    """The model's own attention."""
    before = model.config._attn_implementation
    model.set_attn_implementation(attention)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@torch.no_grad()
def read(model: Any, cache: Any, ids: torch.Tensor, chunk: int) -> float:
    """Seconds until the token after ``ids`` (R, n) is known, read in chunks, all of which must be cached."""
    before = cache.get_seq_length()
    synchronize()
    start = time.perf_counter()
    for part in ids.split(chunk, 1):
        logits = model(part, **cache_argument(model, cache), logits_to_keep=1).logits
    logits.argmax(-1)
    synchronize()
    spent = time.perf_counter() - start
    if int(cache.get_seq_length()) != before + ids.shape[1]:
        raise RuntimeError("the model did not use the cache it was given")
    return spent


def bounded(
    model: Any, made: hooks.Attachment, config: EvictionConfig, rows: int, tokens: int, chunk: int
) -> BoundedCache:
    """A bounded cache that has read random tokens."""
    cache = hooks.new_cache(model, made, config)
    read(model, cache, torch.randint(0, model.config.vocab_size, (rows, tokens), device=DEVICE), chunk)
    return cache


def recorded(model: Any, cache: BoundedCache) -> FixedStep:
    """The recorded step, or its stand-in on a CPU; what fails is told by ``failed``."""
    return FixedStep(model, cache, Graph if GPU else Called)


def bounded_step(model: Any, cache: BoundedCache, eager: bool) -> Step:
    """What generation runs, or plain passes."""
    step = PlainStep(model, cache) if eager else recorded(model, cache)
    return lambda tokens: step(tokens, torch.clone)


def plain_step(model: Any, cache: Any) -> Step:
    """Forward passes of a stock cache, as transformers runs them."""

    def step(tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = model(tokens, **cache_argument(model, cache)).logits[:, -1]
        return logits

    return step


class InPlace(DynamicLayer):
    """A full cache that is never joined anew: the newest token stands in its last place, and all are seen."""

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self.keys[:, :, -1:], self.values[:, :, -1:] = key_states, value_states
        return self.keys, self.values


def full_cache(model: Any, kind: str, rows: int, tokens: int, room: int) -> Any:
    """A full cache that holds random entries: ``grows``, ``in place`` (an ideal one) or ``static``."""
    config = model.config
    if kind == "static":
        cache: Any = StaticCache(config=config, max_cache_len=tokens + room)
    else:
        cache = DynamicCache(config=config)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = (rows, config.num_key_value_heads, tokens, width)
    for index in range(config.num_hidden_layers):
        keys, values = (torch.randn(shape, device=DEVICE, dtype=DTYPE) for _ in range(2))
        if kind == "static":
            cache.layers[index].update(keys, values)
            continue
        cache.layers[index] = layer = (InPlace if kind == "in place" else DynamicLayer)()
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values, layer.is_initialized = keys, values, True
    return cache


@torch.no_grad()
def captured_step(model: Any, cache: Any, rows: int, seen: int) -> Step:
    """Passes of a stock cache of fixed shapes as a graph; on a CPU they are called."""
    token = torch.zeros(rows, 1, dtype=torch.long, device=DEVICE)
    place = torch.full((rows, 1), seen, device=DEVICE)
    out: list[torch.Tensor] = []

    def work() -> None:
        logits = model(token, position_ids=place, **cache_argument(model, cache)).logits[:, -1]
        out[:] = [logits]
        place.add_(1)

    recorder = Graph() if GPU else Called()
    recorder.record(work, lambda: place.fill_(seen))
    place.fill_(seen)

    def step(tokens: torch.Tensor) -> torch.Tensor:
        token.copy_(tokens)
        recorder.repeat(work)
        return out[0].clone()

    return step


def peers() -> dict[str, tuple[str, str, bool]]:
    """Full caches to compare with: attention, kind of cache, and whether the step is captured."""
    known = {
        "full, in place (ideal), captured": ("sdpa", "in place", True),
        "full, StaticCache, captured": ("sdpa", "static", True),
        "full, DynamicCache, eager": ("sdpa", "grows", False),
    }
    if GPU and importlib.util.find_spec("flashinfer"):
        known["full, FlashInfer, captured"] = ("FlashInfer", "in place", True)
    if GPU and importlib.util.find_spec("flash_attn"):
        known["full, flash_attention_2, eager"] = ("flash_attention_2", "grows", False)
    return known


def free() -> None:
    """Give back the memory of a case before the next one."""
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()
