"""Small trimkv folders, built as the released ones are."""

import json

import torch

LAYERS, HEADS, HIDDEN, WIDTH = 3, 2, 64, 32
TEXT, VISION = "model.", "model.language_model."
CONFIG, WEIGHTS = "config.json", "trimkv_weights.pth"
DTYPES = torch.float32, torch.bfloat16, torch.float16


def config(kind="rg10", tied=True, vision=False, **more):
    base = {
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": HEADS,
        "head_dim": 16,
        "hidden_act": "silu",
        "rope_theta": 1000000,
    }
    gate = {
        "retention_gate": kind,
        "retention_gate_intermediate_size": WIDTH,
        "retention_gate_bias_init": 18.0,
        "tie_retention_gate_layers": tied,
    }
    top = {"memory_size": 128, "global_capacity": kind == "rg10", "base_model": "org/base-é"}
    # the released vision-language folders nest what shapes the gate, and nothing else
    joined = {"text_config": base | gate} if vision else base | gate
    return {"model_type": "test"} | joined | top | more


def state(kind="rg10", tied=True, dtype=torch.float32, prefix=TEXT, layers=range(LAYERS), seed=0):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape, scale=0.2):
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    def last():
        return random(HEADS, WIDTH), random(HEADS) + 8

    shared = last()
    tensors = {}
    for layer in layers:
        weight, bias = shared if tied else last()
        own = {"bias": bias, "linear1.weight": random(WIDTH, HIDDEN), "linear1.bias": random(WIDTH)}
        if kind == "rg10":
            own |= {"linear2.weight": random(WIDTH, WIDTH), "linear2.bias": random(WIDTH)}
        own["linear3.weight" if kind == "rg10" else "linear2.weight"] = weight
        tensors |= {f"{prefix}layers.{layer}.self_attn.retention_gate.{n}": t for n, t in own.items()}
    return tensors


def write(folder, config, state):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config))
    torch.save(state, folder / WEIGHTS)
    return folder


def read(folder):
    weights = torch.load(folder / WEIGHTS, weights_only=True)
    return json.loads((folder / CONFIG).read_text()), weights


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name
