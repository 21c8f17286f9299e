"""A tiny Llama in a GGUF file, quantised as the real one is."""

import hashlib
import zipfile

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from tokenizers.pre_tokenizers import ByteLevel

HIDDEN, HEADS, KV_HEADS, LAYERS, INNER = 64, 4, 2, 2, 96
LETTERS = sorted(ByteLevel.alphabet())
MERGES = ["a b", "ab c", "Ġ Ġ", "Ġ a", "1 2"]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
WORDS = [*SPECIAL, *LETTERS, *(pair.replace(" ", "") for pair in MERGES)]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"


def weights():
    """What a model of transformers would hold, (name, array) with llama.cpp's names and order of rows."""
    random = np.random.default_rng(0)

    def normal(*shape):
        return random.normal(size=shape, scale=0.3).astype(np.float32)

    yield "token_embd.weight", normal(len(WORDS), HIDDEN), Kind.Q8_0
    yield "output_norm.weight", 1 + normal(HIDDEN), Kind.F32
    size = HIDDEN // HEADS
    for layer in range(LAYERS):
        shapes = {
            "attn_q": (HIDDEN, HIDDEN),
            "attn_k": (KV_HEADS * size, HIDDEN),
            "attn_v": (KV_HEADS * size, HIDDEN),
            "attn_output": (HIDDEN, HIDDEN),
            "ffn_gate": (INNER, HIDDEN),
            "ffn_up": (INNER, HIDDEN),
            "ffn_down": (HIDDEN, INNER),
        }
        for name, shape in shapes.items():
            yield f"blk.{layer}.{name}.weight", normal(*shape), Kind.Q4_1
        for name in ("attn_norm", "ffn_norm"):
            yield f"blk.{layer}.{name}.weight", 1 + normal(HIDDEN), Kind.F32


def write_gguf(path, architecture="llama", cut="smollm", more=()):
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(512)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(30000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(cut)
    writer.add_token_list(WORDS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(WORDS) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for name, values, kind in [*weights(), *more]:
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def pack(path, member, file):
    with zipfile.ZipFile(path, "w") as package:
        package.write(file, member)
    return path


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()
