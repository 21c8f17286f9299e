"""Names and weights that mean a base model, and those that do not."""

import json

import numpy as np
import pytest

from mlx_kvret import hub
from mlx_kvret.core.fingerprint import fingerprint
from mlx_kvret.core.tensors import Tensor, write_tensors
from mlx_kvret.errors import ConfigError
from mlx_kvret.zoo import known
from mlx_kvret.zoo.identity import Subject, folder_norms, is_copy, norms_digest, of_folder

QWEN = "Qwen/Qwen3-4B-Instruct-2507"
CACHE = "/home/me/.cache/huggingface/hub/models--"


@pytest.mark.parametrize(
    "name",
    [
        QWEN,
        QWEN.lower(),
        "mlx-community/Qwen3-4B-Instruct-2507-4bit",
        "mlx-community/Qwen3-4B-Instruct-2507-4bit-DWQ",
        "mlx-community/Qwen3-4B-Instruct-2507-8bit",
        "mlx-community/Qwen3-4B-Instruct-2507-bf16",
        "mlx-community/Qwen3-4B-Instruct-2507-fp16",
        "lmstudio-community/Qwen3-4B-Instruct-2507-MLX-4bit",
        "Qwen/Qwen3-4B-Instruct-2507-MLX-bf16",
        f"{CACHE}Qwen--Qwen3-4B-Instruct-2507/snapshots/abc",
        f"{CACHE}mlx-community--Qwen3-4B-Instruct-2507-4bit/snapshots/abc",
        "/models/mlx-community/Qwen3-4B-Instruct-2507-6bit",
        "~/models/Qwen/Qwen3-4B-Instruct-2507",
    ],
)
def test_a_base_and_its_copies(name):
    assert is_copy(name, QWEN)


@pytest.mark.parametrize(
    "name",
    [
        "Qwen/Qwen3-4B",
        "Qwen/Qwen3-4B-Thinking-2507",
        "mlx-community/Qwen3-4B-4bit",
        "mlx-community/Qwen3-4B-Thinking-2507-4bit",
        "someone/Qwen3-4B-Instruct-2507",
        "mlx-community/Qwen3-4B-Instruct-2507-abliterated-4bit",
        "mlx-community/My-Qwen3-4B-Instruct-2507-4bit",
        "Qwen/Qwen3-4B-Instruct-2507-AWQ",
        "./Qwen3-4B-Instruct-2507",
        "Qwen3-4B-Instruct-2507",
        f"{CACHE}someone--Qwen3-4B-Instruct-2507/snapshots/abc",
        "smollm2", "demo", "", "/", "models--", "models--x", "a/b/c",
    ],
)  # fmt: skip
def test_what_is_none(name):
    assert not is_copy(name, QWEN)


def test_names_known_here():
    assert is_copy("smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct") and is_copy("demo", "demo")
    assert not is_copy("smollm2", "demo") and not is_copy("./demo", "demo")


QWEN3_4B = {
    "hidden_size": 2560, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 128, "intermediate_size": 9728, "rope_theta": 1000000, "vocab_size": 151936,
}  # fmt: skip


def bases(config):
    return sorted({entry.base.name for entry in known.entries() if Subject(config).may_be(entry.base)})


def test_bases_of_one_shape_and_those_that_differ_in_theta():
    assert bases(QWEN3_4B) == ["Qwen/Qwen3-4B"]
    assert bases(QWEN3_4B | {"quantization": {"bits": 4}}) == ["Qwen/Qwen3-4B"]
    longer = QWEN3_4B | {"rope_theta": 5000000.0}
    assert bases(longer) == bases({"text_config": longer}) == [QWEN, "Qwen/Qwen3-VL-4B-Instruct"]
    nested = {k: v for k, v in longer.items() if k != "rope_theta"} | {"rope_parameters": {"rope_theta": 5e6}}
    assert bases(nested) == bases(longer)
    assert bases({}) == bases({"rope_theta": 1000000}) == bases({"hidden_size": 2560}) == []


def test_the_default_of_a_base_is_the_global_the_general_one():
    first = {}
    for entry in known.RELEASED:
        first.setdefault(entry.base.name, entry.gates)
    assert first["Qwen/Qwen3-4B"] == "ngocbh/DBTrimKV-Qwen3-4B-Math"
    assert first[QWEN] == "ngocbh/DBTrimKV-Qwen3-4B-Instruct-2507"
    assert len(known.RELEASED) == len({entry.gates for entry in known.RELEASED}) == 10
    for entry in known.RELEASED:
        assert "mathematics" in entry.trained_on or not entry.gates.endswith("Math")
        assert entry.base.name.partition("/")[2] in entry.gates


def norms(seed=0, scale=1.0):
    random = np.random.default_rng(seed)
    return {
        f"model.{name}.weight": Tensor.of(
            1 + scale * random.normal(size=8).astype(np.float32), "BF16"
        ).float32()
        for name in ("layers.0.input_layernorm", "layers.1.input_layernorm", "norm")
    }


def test_digests_are_of_bfloat16_values_whatever_holds_them(tmp_path):
    digest = norms_digest(norms())
    for prefix in ("language_model.model.", "model.language_model.", ""):
        renamed = {name.replace("model.", prefix, 1): values for name, values in norms().items()}
        assert norms_digest(renamed) == digest
    for dtype in ("F32", "BF16", "F16"):
        stored = {name: Tensor.of(values, dtype) for name, values in norms().items()}
        more = {
            "model.layers.0.self_attn.q_proj.weight": Tensor.of(np.ones((2, 8), np.float32)),
            "visual.norm.weight": Tensor.of(np.ones(8, np.float32)),
        }
        write_tensors(tmp_path / "model.safetensors", stored | more)
        assert norms_digest(folder_norms(tmp_path)) == digest
    assert norms_digest(norms(1)) != digest != norms_digest(norms(scale=0.99))
    assert norms_digest(dict(list(norms().items())[:2])) != digest
    assert norms_digest({}) is None


def test_several_files_and_damaged_ones(tmp_path):
    for place, (name, values) in enumerate(norms().items()):
        write_tensors(tmp_path / f"model-{place}.safetensors", {name: Tensor.of(values)})
    assert norms_digest(folder_norms(tmp_path)) == norms_digest(norms())
    for damage in (b"", b"\xff" * 8, b"\x02\0\0\0\0\0\0\0[]", b'\x08\0\0\0\0\0\0\0{"a": 1'):
        (tmp_path / "model-1.safetensors").write_bytes(damage)
        assert folder_norms(tmp_path) == {} and of_folder(tmp_path, {}).digest is None


def test_the_shipped_models_are_what_the_table_says():
    demo_folder = hub.resolve("demo")
    assert demo_folder.is_dir() and hub.resolve("demo", "gates").is_dir()
    config = json.loads((demo_folder / "config.json").read_text())
    (entry,) = [entry for entry in known.entries() if entry.gates == "demo"]
    assert entry.base.shape == fingerprint(config)
    assert Subject(config, ("demo",)).judge(entry.base)[0]
    assert not Subject(config, (str(demo_folder),)).may_be(entry.base)
    with pytest.raises(ConfigError, match="demo is known here"):
        hub.resolve("demo", revision="main")
