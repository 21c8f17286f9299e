"""Read a story in chunks with a bounded cache, then ask each question: plain torch, one story at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from train_gates import Gates
from transformers import Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

from mlx_kvret.core.config import EvictionConfig
from mlx_kvret.core.eviction import select
from mlx_kvret.core.policies import recent_score
from mlx_kvret.core.retention import retention_score
from mlx_kvret.demo.language import END, ID, Story, question


@dataclass
class Layer:
    """A layer's entries, heads padded to equal length: keys and values (H, C, D), the others (H, C)."""

    keys: torch.Tensor
    values: torch.Tensor
    log_beta: torch.Tensor
    position: torch.Tensor
    valid: torch.Tensor

    def keep(self, mask: torch.Tensor) -> Layer:
        """The entries of ``mask`` (H, C), moved together."""
        first = (~mask).to(torch.uint8).sort(dim=1, stable=True).indices[:, : int(mask.sum(1).max())]
        wide = first[..., None].expand(-1, -1, self.keys.shape[-1])
        narrow = [part.gather(1, first) for part in (self.log_beta, self.position, mask)]
        return Layer(self.keys.gather(1, wide), self.values.gather(1, wide), *narrow)


class Reader:
    """The model with a cache that is cut down after every chunk; without ``eviction`` it keeps everything."""

    def __init__(self, model: Qwen3ForCausalLM, gates: Gates, eviction: EvictionConfig | None) -> None:
        config = model.config
        self.model, self.gates, self.eviction = model.eval(), gates, eviction
        self.heads, self.seen = config.num_key_value_heads, 0
        none = torch.zeros(self.heads, 0)
        wide = torch.zeros(self.heads, 0, config.head_dim)
        self.layers = [
            Layer(wide, wide, none, none.long(), none.bool()) for _ in range(config.num_hidden_layers)
        ]

    @torch.no_grad()
    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, list[Layer]]:
        """Logits (B, n, words) of B continuations ``ids`` (B, n), and the first one's new entries."""
        rows, count = ids.shape
        position = self.seen + torch.arange(count)
        hidden, new = self.model.model.embed_tokens(ids), []
        rotary = self.model.model.rotary_emb(hidden, position[None])
        for index, (block, old) in enumerate(zip(self.model.model.layers, self.layers, strict=True)):
            x, attention = block.input_layernorm(hidden), block.self_attn
            split = (rows, count, -1, attention.head_dim)
            q = attention.q_norm(attention.q_proj(x).view(split)).transpose(1, 2)
            k = attention.k_norm(attention.k_proj(x).view(split)).transpose(1, 2)
            v = attention.v_proj(x).view(split).transpose(1, 2)
            q, k = apply_rotary_pos_emb(q, k, *rotary)
            there, valid = position.expand(self.heads, count), torch.ones(self.heads, count, dtype=torch.bool)
            new.append(Layer(k[0], v[0], self.gates(index, x[0]).T, there, valid))
            keys, values = (
                torch.cat([kept.expand(rows, -1, -1, -1), fresh], 2)
                for kept, fresh in ((old.keys, k), (old.values, v))
            )
            seen = old.valid[:, None, :].expand(-1, count, -1)
            causal = torch.ones(count, count, dtype=torch.bool).tril().expand(self.heads, -1, -1)
            mask = torch.cat([seen, causal], 2).repeat_interleave(attention.num_key_value_groups, 0)[None]
            out = scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=True)
            hidden = hidden + attention.o_proj(out.transpose(1, 2).reshape(rows, count, -1))
            hidden = hidden + block.mlp(block.post_attention_layernorm(hidden))
        return self.model.lm_head(self.model.model.norm(hidden)), new

    def read(self, ids: tuple[int, ...], chunk: int) -> None:
        """Take in a text, evicting after every chunk."""
        for start in range(0, len(ids), chunk):
            part = torch.tensor([ids[start : start + chunk]])
            _, new = self.forward(part)
            self.layers = [
                Layer(*(torch.cat([getattr(a, name), getattr(b, name)], 1) for name in vars(a)))
                for a, b in zip(self.layers, new, strict=True)
            ]
            self.seen += part.shape[1]
            if self.eviction:
                self._evict(self.eviction)

    def _evict(self, eviction: EvictionConfig) -> None:
        valid = [layer.valid for layer in self.layers]
        log_beta, position = (
            torch.cat([getattr(layer, name)[layer.valid] for layer in self.layers]).numpy()
            for name in ("log_beta", "position")
        )
        head = np.repeat(np.arange(len(valid) * self.heads), torch.cat([v.sum(1) for v in valid]).numpy())
        learned = eviction.policy == "learned"
        score = retention_score(log_beta, position, self.seen) if learned else recent_score(position)
        kept = select(score, position, head, self.seen, eviction, len(valid), self.heads)
        sizes = [int(v.sum()) for v in valid]
        for index, part in enumerate(torch.from_numpy(kept).split(sizes)):
            mask = torch.zeros_like(valid[index])
            mask[valid[index]] = part
            self.layers[index] = self.layers[index].keep(mask)

    def ask(self, story: Story) -> float:
        """Share of the story's facts that ``recall NAME`` answers with the value and then the end token."""
        told = [(*question(name), ID[value]) for name, value in story.facts.items()]
        ids = torch.tensor(told)
        said = self.forward(ids)[0].argmax(-1)
        return float(((said[:, 1] == ids[:, 2]) & (said[:, 2] == END)).float().mean())
