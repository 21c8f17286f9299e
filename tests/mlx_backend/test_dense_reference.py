"""A whole forward pass from scratch: full KV arrays with evicted entries masked out, and the policy core."""

import mlx.core as mx
import numpy as np
import pytest
from tiny import forward, pieces, prompt, random_gates, shape_of, tiny

import mlx_kvret
from mlx_kvret.core.config import EvictionConfig
from mlx_kvret.core.eviction import due_groups, select
from mlx_kvret.core.retention import log_sigmoid, retention_score


def norm(x, weight, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def silu(x):
    return x / (1 + np.exp(-x))


def rope(x, positions, base):
    """Rotate halves of x (H, T, D)."""
    half = x.shape[-1] // 2
    angle = positions[:, None] * base ** (-np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)


class Dense:
    """A Qwen3 in float64 numpy that forgets by mask: ``alive`` (L, H, tokens)."""

    def __init__(self, model, gates, config):
        args = model.args
        self.args, self.gates, self.config = args, gates, config
        weights = dict(mlx_flat(model))
        self.weights = {name: np.array(array, np.float64) for name, array in weights.items()}
        shape = (args.num_hidden_layers, args.num_key_value_heads, 0)
        self.keys, self.values = np.zeros((*shape, args.head_dim)), np.zeros((*shape, args.head_dim))
        self.log_beta, self.alive = np.zeros(shape, np.float32), np.zeros(shape, bool)

    def gate(self, layer, x):
        w = self.gates.layer(layer)
        for name in ("linear1", "linear2"):
            x = silu(x @ w[f"{name}.weight"].T + w[f"{name}.bias"])
        return log_sigmoid(x @ w["linear3.weight"].T + w["bias"]).T

    def __call__(self, tokens):
        args, w = self.args, self.weights
        old, count = self.alive.shape[-1], len(tokens)
        h = w["model.embed_tokens.weight"][tokens]
        grown = {name: [] for name in ("keys", "values", "log_beta")}
        for layer in range(args.num_hidden_layers):
            name = f"model.layers.{layer}."
            x = norm(h, w[name + "input_layernorm.weight"], args.rms_norm_eps)
            k, v, h_attn = self.attention(layer, name + "self_attn.", x, old)
            grown["keys"].append(k), grown["values"].append(v), grown["log_beta"].append(self.gate(layer, x))
            h = h + h_attn
            x = norm(h, w[name + "post_attention_layernorm.weight"], args.rms_norm_eps)
            gate, up, down = (w[f"{name}mlp.{part}_proj.weight"].T for part in ("gate", "up", "down"))
            h = h + silu(x @ gate) * (x @ up) @ down
        for attribute, new in grown.items():
            setattr(self, attribute, np.concatenate([getattr(self, attribute), np.array(new)], axis=2))
        self.alive = np.concatenate([self.alive, np.ones((*self.alive.shape[:2], count), bool)], axis=2)
        self.evict()
        return norm(h, w["model.norm.weight"], args.rms_norm_eps) @ w["lm_head.weight"].T

    def attention(self, layer, name, x, old):
        args, w = self.args, self.weights
        positions = np.arange(old, old + len(x))

        def heads(part, count):
            return (x @ w[f"{name}{part}_proj.weight"].T).reshape(len(x), count, args.head_dim).swapaxes(0, 1)

        q = norm(heads("q", args.num_attention_heads), w[name + "q_norm.weight"], args.rms_norm_eps)
        k = norm(heads("k", args.num_key_value_heads), w[name + "k_norm.weight"], args.rms_norm_eps)
        q, k, v = (
            rope(q, positions, args.rope_theta),
            rope(k, positions, args.rope_theta),
            heads("v", args.num_key_value_heads),
        )
        group, out = args.num_attention_heads // args.num_key_value_heads, []
        for head, query in enumerate(q):
            kv = head // group
            keys, values = np.r_[self.keys[layer, kv], k[kv]], np.r_[self.values[layer, kv], v[kv]]
            visible = np.arange(len(keys)) <= positions[:, None]
            visible[:, :old] &= self.alive[layer, kv]
            logits = np.where(visible, query @ keys.T / np.sqrt(args.head_dim), -np.inf)
            weight = np.exp(logits - logits.max(-1, keepdims=True))
            out.append(weight @ values / weight.sum(-1, keepdims=True))
        return k, v, np.stack(out, 1).reshape(len(x), -1) @ w[name + "o_proj.weight"].T

    def evict(self):
        layers, kv_heads, seen = self.alive.shape
        rule = self.config, layers, kv_heads
        if not due_groups(self.alive.sum(2).reshape(-1), *rule).any():
            return
        layer, head, position = np.nonzero(self.alive)
        score = retention_score(self.log_beta[layer, head, position], position, seen, self.config.lookahead)
        keep = select(score, position, layer * kv_heads + head, seen, *rule)
        self.alive[layer, head, position] = keep


def mlx_flat(model):
    from mlx.utils import tree_flatten

    return tree_flatten(model.parameters())


@pytest.mark.parametrize(
    "options",
    [
        {"budget": 9, "buffer": 4},
        {"budget": 5, "buffer": 0, "scope": "layer"},
        {"budget": 12, "buffer": 7, "scope": "head", "lookahead": 16},
        {"budget": 10, "buffer": 3, "min_per_head": 2, "sinks": 2, "window": 4},
    ],
    ids=str,
)
def test_logits_and_kept_positions(options):
    model = mlx_kvret.attach(tiny(num_hidden_layers=3))
    gates, config = random_gates(shape_of(model), seed=1), EvictionConfig(**options)
    mlx_kvret.attach(model, gates)
    dense, cache = Dense(model, gates, config), mlx_kvret.make_cache(model, **options)
    evicted = 0
    for chunk in pieces(prompt(90, seed=2), [23, 1, 1, 30, 1]):
        np.testing.assert_allclose(forward(model, chunk, cache), dense(np.array(chunk)), rtol=2e-3, atol=2e-4)
        found = cache.kept_positions()
        for layer, head in np.ndindex(*dense.alive.shape[:2]):
            np.testing.assert_array_equal(found[layer][head], np.flatnonzero(dense.alive[layer, head]))
        evicted = (~dense.alive).sum()
    assert evicted > 3 * config.budget
    mx.clear_cache()
