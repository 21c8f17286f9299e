"""Train retention gates for the demo with eyes, from the gates that the text demo ships or from nothing."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import torch
from model import CONFIG, embed
from streams import questioned_album, stream, targets
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import Qwen3VLForConditionalGeneration

from mlx_kvret import demo
from mlx_kvret.core.checkpoint import load_gates, save_gates
from mlx_kvret.core.fingerprint import fingerprint
from mlx_kvret.cuda_backend.gates import RetentionGates, from_checkpoint, to_arrays
from mlx_kvret.cuda_backend.kernels.soft_size import soft_size
from mlx_kvret.cuda_backend.training.loss import active, capacity
from mlx_kvret.cuda_backend.training.student import Student

STEPS, TEXTS, TOKENS, PEAK_RATE = 200, 2, 512, 3e-3
# M of the capacity loss, another for each step: what a larger budget shall keep is learned as well
BUDGETS = (4, 8, 16, 32)
# The first layer's gate begins anew. What it reads of a picture is the tower's own, which no gate of text
# has ever seen, and which the shipped one takes for everlasting: so near to 1 that no gradient would teach
# it otherwise. Deeper layers read of a picture what they would read of words.
FIRST_BIAS = 2.0
NAME = "mlx-kvret demo-vision"


def train(
    model_folder: Path,
    seed: int,
    folder: Path,
    steps: int = STEPS,
    start: Path = demo.GATES,
    fresh: bool = True,
) -> None:
    """Train one set of gates and write its checkpoint; the same arguments give the same gates.

    Minimises mean(KL to the full-attention model, cross-entropy) + capacity loss, as for the text demo. The
    tower runs once a step, without a gradient, for teacher and student. About a minute of one idle thread.
    """
    torch.set_num_threads(1)
    student = Student(Qwen3VLForConditionalGeneration.from_pretrained(model_folder))
    torch.manual_seed(seed)
    known = load_gates(start)
    config = dataclasses.replace(
        known.config,
        training_budget=None,
        base_model=NAME,
        base_fingerprint=fingerprint(CONFIG.to_dict()),
    )
    rng, gates = np.random.default_rng(1000 + seed), from_checkpoint(known)
    if fresh:
        new = RetentionGates(dataclasses.replace(config, bias_init=FIRST_BIAS))
        gates.layers[0].load_state_dict(new.layers[0].state_dict())
    gates.requires_grad_(True)
    optimizer = torch.optim.AdamW(gates.parameters(), betas=(0.9, 0.98), weight_decay=0.0)
    starts = torch.zeros(TEXTS, TOKENS, dtype=torch.long)
    age = torch.arange(TOKENS).expand(TEXTS, -1)
    for step in range(steps):
        cosine = 0.5 * (1 + math.cos(math.pi * step / steps)) + 0.02
        optimizer.param_groups[0]["lr"] = PEAK_RATE * min(1.0, (step + 1) / 20) * cosine
        makers = [stream if rng.random() < 0.2 else questioned_album for _ in range(TEXTS)]
        texts = [make(rng, TOKENS + 1) for make in makers]
        target, weight = targets(texts)
        with torch.no_grad():
            given = embed(student.model, [text.album for text in texts], TOKENS)
        ids = torch.tensor([text.album.ids[:TOKENS] for text in texts])
        counts = weight.flatten() > 0
        target, weight = target.flatten()[counts], weight.flatten()[counts]
        trace = student.learn(ids, starts, gates, seen=given)
        said = log_softmax(student.logits(trace.hidden.flatten(0, 1)[counts]), -1)
        taught = log_softmax(
            student.logits(student.teach(ids, starts, given).hidden.flatten(0, 1)[counts]), -1
        )
        loss = cross_entropy(said, target, reduction="none")
        loss = (loss + kl_div(said, taught, log_target=True, reduction="none").sum(-1)) / 2
        budget = int(rng.choice(BUDGETS))
        size = capacity(soft_size(trace.log_beta, starts), age, budget, "global")
        size = size / active(age, budget).sum()
        words = (loss * weight).sum()
        optimizer.zero_grad()
        (words + size).backward()
        torch.nn.utils.clip_grad_norm_(gates.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0:
            print(f"gates {seed}, {step}: words {words:.3f}, capacity {size:.3f}", flush=True)
    told = {"command": "python examples/vision.py", "gate_seed": seed, "steps": steps, "tokens": TOKENS}
    told |= {
        "started_from": known.config.base_model or "nothing",
        "learning_rate": PEAK_RATE,
        "training_budgets": BUDGETS,
    }
    save_gates(folder, config, to_arrays(gates), told)
