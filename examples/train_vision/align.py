"""Align a new vision tower with a language model that is not changed and is never asked a question.

A cell of a picture shall leave after layer 0 (its embedding and its DeepStack feature together) what the
same fact in words leaves there: the language model, asked for its hidden state at the last word of
``remember NAME VALUE``, is the teacher of every cell. That takes about a minute of one thread; asking for
answers only, it would take many.
"""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import torch
from model import CONFIG, embed
from torch.nn.functional import mse_loss

from mlx_kvret.demo import language as words
from mlx_kvret.demo.albums import Album
from mlx_kvret.demo.pictures import (
    FACT,
    IMAGE,
    NAME_IDS,
    NAMES,
    PALETTE,
    START,
    STOP,
    VALUE_IDS,
    cells,
    picture,
)

STEPS, PICTURES, PEAK_RATE = 1000, 24, 3e-3
_FILLER = 6


def after_first_layer(model: Any, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Hidden states (B, T, hidden) after layer 0 of the language model, without DeepStack."""
    text = model.model.language_model
    out = text.layers[0](x, position_embeddings=text.rotary_emb(x, position), attention_mask=None)
    return out[0] if isinstance(out, tuple) else out


@torch.no_grad()
def taught(model: Any, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states (3, names, values, hidden) of paper, facts and decoys in words; and their spread."""
    table = []
    for mark in (words.REMEMBER, words.RUMOUR):
        ids = torch.tensor(
            [
                [words.BOS, *words.filler(rng, _FILLER, _some_filler(rng)), mark, int(name), int(value)]
                for name in NAME_IDS
                for value in VALUE_IDS
            ]
        )
        position = torch.arange(ids.shape[1])[None, None].expand(3, len(ids), -1)
        h = after_first_layer(model, model.model.get_input_embeddings()(ids), position)
        table.append(h[:, -1].unflatten(0, (len(NAMES), len(PALETTE))))
        paper = h[:, 1 : 1 + _FILLER].flatten(0, 1).mean(0)
    spread = torch.cat([t.flatten(0, 1) for t in table]).std(0).mean()
    return torch.stack([paper.expand_as(table[0]), *table]), spread


def align(model: Any, rng: np.random.Generator, steps: int = STEPS) -> float:
    """Train the tower; returns how many facts and decoys are read right in the last fifty steps, 0 to 1."""
    for weight in model.model.language_model.parameters():
        weight.requires_grad_(False)
    tower = list(model.model.visual.parameters())
    optimizer = torch.optim.AdamW(tower, lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    table, spread = taught(model, rng)
    flat, right, began = table[1:].flatten(0, 2), list[float](), time.process_time()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = PEAK_RATE * min(1, (step + 1) / 30) * (1 - 0.95 * step / steps)
        h, kinds, names, values = _picture_states(model, rng)
        loss = mse_loss(h, table[kinds, names, values]) / spread**2
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tower, 1.0)
        optimizer.step()
        with torch.no_grad():
            drawn = kinds > 0
            code = ((kinds - FACT) * len(NAMES) + names) * len(PALETTE) + values
            right.append(float((torch.cdist(h[drawn], flat).argmin(-1) == code[drawn]).float().mean()))
        if step % 25 == 0:
            spent = time.process_time() - began
            print(f"align {step}: loss {loss:.3f}, nearest right {right[-1]:.3f}, {spent:.0f} s", flush=True)
    return math.fsum(right[-50:]) / len(right[-50:])


def _picture_states(model: Any, rng: np.random.Generator) -> tuple[torch.Tensor, ...]:
    """What cells of random pictures of one size leave (n, hidden), their kinds, names and values (n,)."""
    rows, columns = rng.integers(3, 8, 2).tolist()
    count = rows * columns
    kinds = rng.choice(3, size=(PICTURES, count), p=(0.3, 0.4, 0.3))
    names, values = (rng.integers(len(x), size=(PICTURES, count)) for x in (NAMES, PALETTE))
    ids = [words.BOS, START, *[IMAGE] * count, STOP]
    albums = [
        Album(list(ids), [picture(cells(rng, k, n, v), rows, columns)])
        for k, n, v in zip(kinds, names, values, strict=True)
    ]
    given = embed(model, albums, len(ids))
    deep = given["deepstack_visual_embeds"]
    assert len(deep) == len(CONFIG.vision_config.deepstack_visual_indexes) == 1
    h = after_first_layer(model, given["inputs_embeds"], given["position_ids"])[given["visual_pos_masks"]]
    return (h + deep[0], *(torch.from_numpy(x.reshape(-1)) for x in (kinds, names, values)))


def _some_filler(rng: np.random.Generator) -> int:
    return words.FIRST_FILLER + int(rng.integers(len(words.FILLER)))
