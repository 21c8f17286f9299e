"""Train the demo model, on at most 256 tokens at a time. About nine minutes on one thread."""

from __future__ import annotations

import math
import time

import numpy as np
import torch
from model import CONFIG, logits, new_model
from streams import batch, copies, positions, stream
from torch.nn.functional import cross_entropy
from transformers import Qwen3ForCausalLM

STEPS, TOKENS, PEAK_RATE = 3000, 4096, 3e-3
LENGTHS = (64, 128, 256)


def train_model(seed: int) -> Qwen3ForCausalLM:
    """The curriculum: copying and facts; then decoys and longer texts; then positions that skip ahead."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = new_model()
    norms = [p for p in model.parameters() if p.dim() < 2]
    matrices = [p for p in model.parameters() if p.dim() == 2]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    longest = CONFIG.max_position_embeddings
    phase, since, accuracy, start = 0, 0, 0.0, time.time()
    for step in range(STEPS):
        for group, factor in zip(optimizer.param_groups, (1, 2), strict=True):
            group["lr"] = factor * _rate(step)
        if (phase == 0 and (accuracy > 0.85 or step > 0.3 * STEPS)) or (
            phase == 1 and accuracy > 0.85 and step - since > 150
        ):
            phase, since = phase + 1, step
            print(f"step {step}: phase {phase} after {time.time() - start:.0f} s", flush=True)
        tokens = LENGTHS[0] if phase == 0 else int(rng.choice(LENGTHS))
        streams = [
            copies(rng, tokens + 1)
            if rng.random() < (0.6, 0.1, 0.05)[phase]
            else stream(rng, tokens + 1, decoys=phase > 0)
            for _ in range(TOKENS // tokens)
        ]
        place = [
            positions(rng, s.starts, tokens, longest) if phase == 2 else np.arange(tokens) for s in streams
        ]
        ids, target, weight = batch(streams)
        out = logits(model, ids, torch.from_numpy(np.stack(place)))
        loss = (cross_entropy(out.transpose(1, 2), target, reduction="none") * weight).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

        answered = torch.zeros_like(target, dtype=torch.bool)
        for row, s in enumerate(streams):
            if s.starts:
                answered[row, np.array(s.answers, int) - 1] = True
        right = (out.argmax(-1) == target) & answered
        accuracy += 0.05 * (float(right.sum() / answered.sum().clamp(min=1)) - accuracy)
        if step % 100 == 0:
            spent = time.time() - start
            print(f"step {step}: loss {loss:.3f}, answers {accuracy:.3f}, {spent:.0f} s", flush=True)
    return model.eval()


def _rate(step: int) -> float:
    """Warm-up over 100 steps, constant, then a cosine over the second half."""
    done = max(0.0, 2 * step / STEPS - 1)
    return PEAK_RATE * min(1.0, (step + 1) / 100) * (0.5 * (1 + math.cos(math.pi * done)) + 0.01)
