"""Models whose code is a folder's own, which mlx-lm runs without a module that could be imported by name."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx_lm.models.qwen3 as stock_file
import pytest
from mlx.utils import tree_flatten
from tiny import COMMON, forward, prompt, tiny

import mlx_kvret
from mlx_kvret.errors import UnsupportedModelError

SMALL = {"policy": "recent", "budget": 12, "buffer": 4}


@pytest.fixture
def folder(tmp_path):
    """A model folder with its code beside it."""
    code = Path(stock_file.__file__).read_text().replace("from .", "from mlx_lm.models.")
    (tmp_path / "own.py").write_text(code)
    config = {"model_type": "qwen3", "model_file": "own.py", **COMMON}
    (tmp_path / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(tmp_path / "model.safetensors"), dict(tree_flatten(tiny().parameters())))
    return tmp_path


def test_a_model_file_is_bounded_as_mlx_lm_s_own(folder):
    model, _ = mlx_kvret.load(folder, None, backend="mlx", trust_remote_code=True)
    assert type(model).__module__ not in sys.modules
    stock = mlx_kvret.attach(tiny())
    found, expected = (forward(one, prompt(40), mlx_kvret.make_cache(one, **SMALL)) for one in (model, stock))
    assert abs(found - expected).max() < 1e-5
    mlx_kvret.detach(model)
    assert not hasattr(type(model).__call__, "__wrapped__")


def test_attention_by_another_name_is_refused(folder):
    spec = importlib.util.spec_from_file_location("elsewhere", folder / "own.py")
    module = importlib.util.module_from_spec(spec)
    code = (
        (folder / "own.py")
        .read_text()
        .replace("scaled_dot_product_attention(\n", "base.scaled_dot_product_attention(\n")
    )
    code = code.replace("create_attention_mask, scaled_dot_product_attention", "create_attention_mask")
    exec(compile("import mlx_lm.models.base as base\n" + code, "own.py", "exec"), vars(module))
    model = module.Model(module.ModelArgs.from_dict({"model_type": "qwen3", **COMMON}))
    with pytest.raises(UnsupportedModelError, match="does not call mlx-lm's"):
        mlx_kvret.attach(model)


def test_a_copy_of_a_model_class_in_a_script(folder):
    code = (folder / "own.py").read_text() + (
        "\nimport copy, mlx_kvret\n"
        f"model = Model(ModelArgs.from_dict({ {'model_type': 'qwen3', **COMMON}!r}))\n"
        f"mlx_kvret.attach(model, **{SMALL!r})\n"
        "twin = copy.deepcopy(model)\n"
        "print(mlx_kvret.generate(model, None, list(range(40)), max_tokens=3)"
        " == mlx_kvret.generate(twin, None, list(range(40)), max_tokens=3))\n"
    )
    (folder / "script.py").write_text(code)
    done = subprocess.run([sys.executable, folder / "script.py"], capture_output=True, text=True, timeout=200)
    assert done.stdout.strip() == "True", done.stderr[-2000:]
