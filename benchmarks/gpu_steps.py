"""Recorded steps against plain passes, on small models: logits and what is kept. Part of gpu_check.py."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from gpu_cases import bounded_step, build, recorded
from gpu_timing import DEVICE, GPU
from transformers import AutoConfig, AutoModelForCausalLM

import mlx_kvret
from mlx_kvret.core.config import EvictionConfig
from mlx_kvret.cuda_backend import hooks
from mlx_kvret.cuda_backend.cache import cache_argument

Put = Callable[..., None]


def sliding() -> tuple[Any, hooks.Attachment]:
    """A random model in which every other layer has a sliding window."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "gemma3_text", vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, sliding_window=16, eos_token_id=None,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )  # fmt: skip
    model: Any = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False).to(DEVICE)
    return model, hooks.install(model, None, {"model": ""}, {"policy": "recent"})


@torch.no_grad()
def compare(
    model: Any, made: hooks.Attachment, config: EvictionConfig, rows: int, tokens: int
) -> dict[str, Any]:
    """The largest relative difference of logits over ``tokens``, and whether the same entries are kept."""
    vocabulary, read = model.config.vocab_size, 3 * config.budget
    ids = torch.randint(1, vocabulary, (rows, read + tokens), device=DEVICE)
    caches = [hooks.new_cache(model, made, config) for _ in range(2)]
    for cache in caches:
        for part in ids[:, :read].split(config.budget, 1):
            model(part, **cache_argument(model, cache), logits_to_keep=1)
    step, plain, worst = recorded(model, caches[0]), bounded_step(model, caches[1], eager=True), 0.0
    for place in range(read, read + tokens):
        token = ids[:, place : place + 1]
        ours, expected = step(token, torch.clone).double(), plain(token).double()
        worst = max(worst, float((ours - expected).norm() / expected.norm()))
    kept = [[str(cache.kept_positions(row)) for row in range(rows)] for cache in caches]
    same = kept[0] == kept[1] and caches[0].seen == caches[1].seen
    return {"worst_difference": worst, "same_kept": same, "captures": step.captures, "failed": step.failed}


def check_steps(put: Put, left: Callable[[], float]) -> None:
    """Tokens one by one by both ways; the public loops; and what a recording that fails leaves behind."""
    # in half precision scores tie
    exact, made = build("tiny", torch.float32)
    budget = 64 if GPU else 10
    config = EvictionConfig.create(budget)
    for name, own, attachment, rows in (
        ("float32, 1 row", exact, made, 1), ("float32, 3 rows in a bucket of 4", exact, made, 3),
        ("sliding windows", *sliding(), 1),
    ):  # fmt: skip
        if left() < 5:
            return
        policy = config if attachment.gates is not None else EvictionConfig.create(budget, policy="recent")
        found = compare(own, attachment, policy, rows, 3 * config.buffer + 20 if GPU else 15)
        good = found["worst_difference"] < 1e-4 and found["same_kept"] and not found["failed"]
        put(f"recorded step, {name}", ok=good, **found)
    prompts = [[1 + i % 250 for i in range(n)] for n in ((300, 40, 150) if GPU else (30, 7, 12))]
    counts = {"budget": budget, "max_tokens": 40 if GPU else 4}
    single = [mlx_kvret.generate(exact, None, prompt, **counts) for prompt in prompts]
    together = mlx_kvret.generate_batch(exact, None, prompts, **counts)
    put("generate, and generate_batch side by side", ok=single == together, tokens=len(single[0].split()))
    failing(put, exact, made, config)


@torch.no_grad()
def failing(put: Put, model: Any, made: hooks.Attachment, config: EvictionConfig) -> None:
    """A model that waits in every step: one warning, plain passes, and random numbers as before."""
    layer = model.get_decoder().layers[0].mlp
    handle = layer.register_forward_hook(lambda m, a, out: out * float(out.abs().sum() >= 0))
    cache = hooks.new_cache(model, made, config)
    model(torch.ones(1, 8, dtype=torch.long, device=DEVICE), **cache_argument(model, cache))
    step = recorded(model, cache)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(3):
            logits = step(torch.ones(1, 1, dtype=torch.long, device=DEVICE), torch.clone)
    handle.remove()
    drawn = torch.multinomial(logits.softmax(-1), 1)
    ours = [str(one.message) for one in told if "plain passes" in str(one.message)]
    put("a recording that fails", ok=step.failed and len(ours) == 1 and cache.seen == 11, told=ours[:1],
        drawn_after_it=int(drawn))  # fmt: skip
    if GPU:
        broken_capture(put)


def broken_capture(put: Put) -> None:
    """A capture that CUDA itself refuses leaves the stream and the random numbers usable."""
    from mlx_kvret.cuda_backend import recording

    calls = []

    def work() -> None:
        calls.append(1)
        x = torch.ones(4, device=DEVICE)
        if len(calls) > 2:
            x.sum().item()

    before = torch.cuda.current_stream()
    try:
        recording.Graph().record(work, lambda: None)
        put("a capture that CUDA refuses", ok=False, why="it was not refused")
    except Exception as error:
        drawn = float(torch.rand(1, device=DEVICE))
        same = torch.cuda.current_stream() == before
        put("a capture that CUDA refuses", ok=same and 0 <= drawn < 1, told=str(error)[:200])
