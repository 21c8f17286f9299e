"""Train retention gates for the frozen demo model, in all the ways that are compared."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from model import CONFIG
from streams import batch, questioned_story, stream
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import AutoModelForCausalLM

from mlx_kvret.core.checkpoint import save_gates
from mlx_kvret.core.config import GateConfig
from mlx_kvret.core.fingerprint import fingerprint
from mlx_kvret.cuda_backend.gates import RetentionGates, to_arrays
from mlx_kvret.cuda_backend.kernels.soft_size import soft_size
from mlx_kvret.cuda_backend.training.loss import active, capacity
from mlx_kvret.cuda_backend.training.student import Student

STEPS, TEXTS, TOKENS, PEAK_RATE, BUDGET = 200, 3, 768, 5e-3, 8


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


def train(model_folder: str | Path, name: str, seed: int, folder: str | Path, steps: int = STEPS) -> None:
    """Train one set of gates and write its checkpoint; the same arguments give the same gates.

    Minimises mean(KL to the full-attention model, cross-entropy) + capacity loss. Four texts in five are
    stories with questions, shorter than those the demo is used on. Two minutes on one idle thread.
    """
    torch.set_num_threads(1)
    variant, device = VARIANTS[name], "cuda" if torch.cuda.is_available() else "cpu"
    student = Student(AutoModelForCausalLM.from_pretrained(model_folder, trust_remote_code=False).to(device))
    torch.manual_seed(seed)
    rng = np.random.default_rng(1000 + seed)
    gates = RetentionGates(gate_config(variant)).to(device)
    optimizer = torch.optim.AdamW(gates.parameters(), betas=(0.9, 0.98), weight_decay=0.0)
    starts = torch.zeros(TEXTS, TOKENS, dtype=torch.long, device=device)
    position = torch.arange(TOKENS, device=device).expand(TEXTS, -1)
    for step in range(steps):
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps)) + 0.02
        optimizer.param_groups[0]["lr"] = PEAK_RATE * min(1.0, (step + 1) / 20) * cosine
        makers = [stream if rng.random() < 0.2 else questioned_story for _ in range(TEXTS)]
        ids, target, weight = (t.to(device) for t in batch([make(rng, TOKENS + 1) for make in makers]))
        trace = student.learn(ids, starts, gates)
        said = log_softmax(student.logits(trace.hidden.flatten(0, 1)), -1)
        loss = cross_entropy(said, target.flatten(), reduction="none")
        if variant.divergence:
            taught = log_softmax(student.logits(student.teach(ids, starts).hidden.flatten(0, 1)), -1)
            loss = (loss + kl_div(said, taught, log_target=True, reduction="none").sum(-1)) / 2
        total = (loss * weight.flatten()).sum()
        if variant.capacity != "none":
            size = soft_size(trace.log_beta, starts)
            total = (
                total + capacity(size, position, BUDGET, variant.capacity) / active(position, BUDGET).sum()
            )
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(gates.parameters(), 1.0)
        optimizer.step()
    told = {"command": "python examples/reproduce.py", "variant": name, "gate_seed": seed, "steps": steps}
    save_gates(folder, gates.config, to_arrays(gates), told | {"tokens": TOKENS, "learning_rate": PEAK_RATE})


def gate_config(variant: Variant) -> GateConfig:
    """Gates of 25k parameters, bound to the demo model by its fingerprint."""
    return GateConfig(
        kind="rg10",
        layers=CONFIG.num_hidden_layers,
        kv_heads=CONFIG.num_key_value_heads,
        hidden_size=CONFIG.hidden_size,
        width=64,
        bias_init=variant.bias,
        training_budget=BUDGET,
        shared_projection=variant.shared,
        base_model="mlx-kvret demo",
        base_fingerprint=fingerprint(CONFIG.to_dict()),
    )
