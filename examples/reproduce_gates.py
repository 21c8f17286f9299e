"""Train gates for the demo model in all the ways that ``reproduce.py`` compares; 90 s each on one thread."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax

sys.path.insert(0, str(Path(__file__).parent / "train_demo"))
from model import CONFIG, logits
from streams import batch, questioned_story, stream
from train_gates import GATES, PEAK_RATE, STEPS, TEXTS, TOKENS
from transformers import AutoModelForCausalLM

from cuda_backend.gates import RetentionGates, to_arrays
from mlx_kvret.core.checkpoint import save_gates
from mlx_kvret.core.fingerprint import fingerprint


@dataclass(frozen=True)
class Variant:
    """One last projection for all layers or one each; the capacity's scope; whether KL counts; the bias."""

    shared: bool = True
    capacity: str = "global"
    divergence: bool = True
    bias: float = 18.0


VARIANTS = {
    "shared": Variant(),
    "separate": Variant(shared=False),
    "per-head": Variant(shared=False, capacity="head"),
    "no-capacity": Variant(capacity="none"),
    "no-KL": Variant(divergence=False),
    "bias-8": Variant(bias=8.0),
}
MAIN = ("shared", "separate", "per-head")


def train(model_folder: str, name: str, seed: int, folder: str, steps: int = STEPS) -> None:
    """Train one set of gates and write its checkpoint; the same arguments give the same gates."""
    torch.set_num_threads(1)
    variant, device = VARIANTS[name], "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(model_folder, attn_implementation="sdpa").eval().to(device)
    model.requires_grad_(False)
    torch.manual_seed(seed)
    rng = np.random.default_rng(1000 + seed)
    config = replace(
        GATES,
        shared_projection=variant.shared,
        bias_init=variant.bias,
        base_model="mlx-kvret demo",
        base_fingerprint=fingerprint(CONFIG.to_dict()),
    )
    gates = RetentionGates(config).to(device)
    optimizer = torch.optim.AdamW(gates.parameters(), betas=(0.9, 0.98), weight_decay=0.0)
    position = torch.arange(TOKENS, device=device)[None]
    for step in range(steps):
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps)) + 0.02
        optimizer.param_groups[0]["lr"] = PEAK_RATE * min(1.0, (step + 1) / 20) * cosine
        makers = [stream if rng.random() < 0.2 else questioned_story for _ in range(TEXTS)]
        ids, target, weight = (t.to(device) for t in batch([make(rng, TOKENS + 1) for make in makers]))
        student, sizes = logits(model, ids, position, gates.log_beta)
        loss = cross_entropy(student.transpose(1, 2), target, reduction="none")
        if variant.divergence:
            with torch.no_grad():
                teacher = log_softmax(logits(model, ids, position)[0], -1)
            fresh = log_softmax(student, -1)
            loss = (loss + kl_div(fresh, teacher, log_target=True, reduction="none").sum(-1)) / 2
        total = (loss * weight).sum() + capacity(torch.stack(sizes), variant.capacity)
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(gates.parameters(), 1.0)
        optimizer.step()
    told = {"command": "python examples/reproduce.py", "variant": name, "gate_seed": seed, "steps": steps}
    save_gates(folder, config, to_arrays(gates), told | {"tokens": TOKENS, "learning_rate": PEAK_RATE})


def capacity(sizes: torch.Tensor, scope: str) -> torch.Tensor:
    """The hinge on the soft cache size (L, B, H, T): of all heads together, of each, or none."""
    if scope == "none":
        return sizes.new_zeros(())
    budget, heads = GATES.training_budget or 1, sizes.shape[0] * sizes.shape[2]
    tokens = torch.arange(sizes.shape[-1], device=sizes.device)
    room = (tokens - budget).clamp(min=1)
    over = sizes.sum((0, 2)) / heads - budget if scope == "global" else sizes - budget
    return (over / room).clamp(min=0)[..., tokens >= budget].mean()
