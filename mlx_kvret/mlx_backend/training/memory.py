"""How much memory a training step needs, worked out from shapes."""

from __future__ import annotations

import math
from typing import Any

from ...core.config import GateConfig
from ...core.fingerprint import text_config
from ...training.memory import Memory
from .attention import BLOCK_ELEMENTS
from .loss import CHUNK_ELEMENTS

# arrays in float32, of the size of a block of attention or a chunk of logits, that are there at once: MLX
# reserves memory for what it will compute while it still computes what comes before
_BLOCK_COPIES, _LOGIT_COPIES = 6, 18


def memory_of(config: dict[str, Any], gates: GateConfig, size: int, recompute: bool) -> Memory:
    """What a step needs beside the weights of the model.

    Args:
        config: the model's ``config.json``.
        size: bytes of an activation: 2 for bfloat16, also of a quantised model.
        recompute: whether layers are recomputed in the backward pass.
    """
    text = text_config(config)
    hidden, layers, heads = text["hidden_size"], text["num_hidden_layers"], text["num_attention_heads"]
    inner = text.get("intermediate_size", 4 * hidden)
    head = text.get("head_dim") or hidden // heads
    wide, narrow = heads * head, text.get("num_key_value_heads", heads) * head
    # inputs and outputs of a layer's maps; what attention computes with is in float32
    inside = size * (6 * hidden + 4 * inner + 2 * wide + 4 * narrow) + 4 * (2 * wide + 2 * narrow)
    kept = hidden * size if recompute else inside
    # one layer with its gradients, and the float32 inside of its gate
    layer = 2 * inside + 4 * (hidden + 6 * gates.width)
    # log β, soft sizes and their gradients
    small = 6 * 4 * gates.layers * gates.kv_heads
    parameters = sum(math.prod(shape) for shape in gates.tensor_shapes().values())
    return Memory(
        # weights, gradients and two moments, and all of them anew while AdamW steps
        fixed=4 * 6 * parameters,
        per_token=layers * kept + layer + small + 4 * hidden * size,
        logits_per_token=_LOGIT_COPIES * 4 * text["vocab_size"],
        chunk=4 * max(_BLOCK_COPIES * BLOCK_ELEMENTS, _LOGIT_COPIES * CHUNK_ELEMENTS),
    )
