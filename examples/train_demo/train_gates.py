"""Train retention gates for the frozen demo model. About 90 seconds on one thread."""

from __future__ import annotations

import math
import time

import numpy as np
import torch
from model import CONFIG, logits
from streams import batch, questioned_story, stream
from torch import nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax, logsigmoid, silu
from transformers import Qwen3ForCausalLM

from mlx_kvret.core.config import GateConfig

STEPS, TEXTS, TOKENS, PEAK_RATE = 200, 3, 768, 5e-3
GATES = GateConfig(
    kind="rg10",
    layers=CONFIG.num_hidden_layers,
    kv_heads=CONFIG.num_key_value_heads,
    hidden_size=CONFIG.hidden_size,
    width=64,
    bias_init=18.0,
    training_budget=8,
)


class Gates(nn.Module):
    """log β of every token and head from the attention block's input; the last map serves all layers."""

    def __init__(self) -> None:
        super().__init__()
        width = GATES.width
        self.linear1 = nn.ModuleList(nn.Linear(GATES.hidden_size, width) for _ in range(GATES.layers))
        self.linear2 = nn.ModuleList(nn.Linear(width, width) for _ in range(GATES.layers))
        self.linear3 = nn.Linear(width, GATES.kv_heads, bias=False)
        self.bias = nn.Parameter(torch.full((GATES.kv_heads,), GATES.bias_init))

    def forward(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        """``x`` (B, T, hidden) to log β (B, T, H)."""
        inner = silu(self.linear2[layer](silu(self.linear1[layer](x))))
        return logsigmoid(self.linear3(inner) + self.bias)

    def named_tensors(self) -> dict[str, torch.Tensor]:
        """The parameters under their names in a gate checkpoint."""
        named = {"shared.linear3.weight": self.linear3.weight.data, "shared.bias": self.bias.data}
        for layer in range(GATES.layers):
            for name, maps in (("linear1", self.linear1), ("linear2", self.linear2)):
                named[f"layers.{layer}.{name}.weight"] = maps[layer].weight.data
                named[f"layers.{layer}.{name}.bias"] = maps[layer].bias.data
        return named


def train_gates(model: Qwen3ForCausalLM, seed: int) -> Gates:
    """Minimise mean(KL to the full-attention model, cross-entropy) + capacity loss.

    Four texts in five are stories with questions, shorter than those the demo is used on.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(1000 + seed)
    model.requires_grad_(False)
    gates = Gates()
    optimizer = torch.optim.AdamW(gates.parameters(), betas=(0.9, 0.98), weight_decay=0.0)
    position, start = torch.arange(TOKENS)[None], time.time()
    for step in range(STEPS):
        cosine = 0.5 * (1 + math.cos(math.pi * step / STEPS)) + 0.02
        optimizer.param_groups[0]["lr"] = PEAK_RATE * min(1.0, (step + 1) / 20) * cosine
        makers = [stream if rng.random() < 0.2 else questioned_story for _ in range(TEXTS)]
        ids, target, weight = batch([make(rng, TOKENS + 1) for make in makers])
        with torch.no_grad():
            teacher, _ = logits(model, ids, position)
        student, sizes = logits(model, ids, position, gates)
        divergence = kl_div(
            log_softmax(student, -1), log_softmax(teacher, -1), log_target=True, reduction="none"
        ).sum(-1)
        entropy = cross_entropy(student.transpose(1, 2), target, reduction="none")
        over = capacity_loss(torch.stack(sizes))
        loss = ((divergence + entropy) / 2 * weight).sum() + over
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(gates.parameters(), 1.0)
        optimizer.step()
        if step % 25 == 0:
            kept = sum(float(s[..., -1].mean()) for s in sizes) / len(sizes)
            print(
                f"gates {seed}, step {step}: loss {loss:.3f}, over budget {over:.4f}, "
                f"soft size {kept:.0f} per head, {time.time() - start:.0f} s",
                flush=True,
            )
    return gates.eval()


def capacity_loss(sizes: torch.Tensor) -> torch.Tensor:
    """The hinge on the soft cache size (L, B, H, T), summed over layers and heads."""
    heads, budget = GATES.layers * GATES.kv_heads, GATES.training_budget
    tokens = torch.arange(sizes.shape[-1])
    room = heads * (tokens - budget)
    excess = (sizes.sum((0, 2)) - heads * budget) / room.clamp(min=1)
    return excess.clamp(min=0)[:, tokens >= budget].mean()
