"""A Llama model in a GGUF file to the folder that transformers and mlx-lm read, with numpy only.

llama.cpp stores the rows of the query and key maps in the order that its RoPE wants, pairs side by side; here
they are put back into halves. Quantised weights are widened to float32, which is exact.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from ..core.tensors import Tensor, write_tensors
from ..core.types import Floats
from ..errors import CheckpointError
from .gguf_fields import Fields
from .gguf_tokenizer import write_tokenizer

WEIGHTS = "model.safetensors"
_TYPES = {"float32": "F32", "bfloat16": "BF16"}
_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_IN_LAYER = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip


def write_folder(source: Path, folder: Path, dtype: str) -> None:
    """Write ``config.json``, ``generation_config.json``, ``model.safetensors`` and the tokenizer's files.

    Args:
        source: a GGUF file of a Llama model without RoPE scaling.
        folder: an empty folder.
        dtype: ``"float32"`` or ``"bfloat16"`` (rounded to nearest).

    Raises:
        CheckpointError: another kind of model.
    """
    reader = gguf.GGUFReader(source)
    fields = Fields(reader)
    if fields["general.architecture"] != "llama":
        raise CheckpointError(f"{source} holds a {fields['general.architecture']} model; expected llama")
    tensors = {name: Tensor.of(values, _TYPES[dtype]) for name, values in _tensors(reader, fields)}
    write_tensors(folder / WEIGHTS, tensors, {"format": "pt"})
    config = _config(fields, dtype, tied="lm_head.weight" not in tensors)
    _write_json(folder / "config.json", config)
    special = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(folder / "generation_config.json", special)
    write_tokenizer(fields, folder)


def _tensors(reader: gguf.GGUFReader, fields: Fields) -> Iterator[tuple[str, Floats]]:
    """Every weight under its name in transformers, float32."""
    heads = {
        "attn_q": fields["llama.attention.head_count"],
        "attn_k": fields["llama.attention.head_count_kv"],
    }
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        place = tensor.name.split(".")
        if place[0] == "blk" and len(place) == 4 and place[2] in _IN_LAYER and place[3] == "weight":
            if place[2] in heads:
                values = _halves(values, heads[place[2]])
            yield f"model.layers.{place[1]}.{_IN_LAYER[place[2]]}.weight", values
        elif tensor.name in _NAMES:
            yield _NAMES[tensor.name], values
        else:
            raise CheckpointError(f"the GGUF file has a tensor {tensor.name}, which no plain Llama has")


def _halves(weight: Floats, heads: int) -> Floats:
    """Rows of each head from pairs side by side to a first and a second half: (heads · 2d, columns)."""
    pairs = weight.reshape(heads, -1, 2, weight.shape[1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(weight.shape))


def _config(fields: Fields, dtype: str, tied: bool) -> dict[str, Any]:
    heads, hidden = fields["llama.attention.head_count"], fields["llama.embedding_length"]
    theta = _short(fields["llama.rope.freq_base"])
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "dtype": dtype,
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "head_dim": fields.get("llama.attention.key_length", hidden // heads),
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": fields["llama.feed_forward_length"],
        "max_position_embeddings": fields["llama.context_length"],
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": fields["llama.block_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "rms_norm_eps": _short(fields["llama.attention.layer_norm_rms_epsilon"]),
        # transformers 5 reads the second, mlx-lm and transformers 4 the first
        "rope_theta": theta,
        "rope_parameters": {"rope_theta": theta, "rope_type": "default"},
        "tie_word_embeddings": tied,
        "torch_dtype": dtype,
        "use_cache": True,
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
    }


def _short(value: float) -> float:
    """The shortest number that is this one in float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
