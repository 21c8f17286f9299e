"""The policy needs numpy, safetensors and the standard library; the package loads no backend by itself."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mlx_kvret.core

BACKENDS = ("mlx", "mlx_lm", "torch", "transformers", "triton", "jax", "tensorflow")
CORE = sorted(Path(mlx_kvret.core.__file__).parent.glob("*.py"))


def loaded_by(*modules: str) -> set[str]:
    """Top-level packages in a fresh interpreter after these imports."""
    code = f"import sys, {', '.join(modules)}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    return set(
        subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True
        ).stdout.split()
    )


def test_package_loads_no_backend():
    assert not loaded_by("mlx_kvret") & set(BACKENDS)


def test_core_loads_numpy_and_safetensors_only():
    modules = [f"mlx_kvret.core.{path.stem}" for path in CORE if path.stem != "__init__"]
    loaded = loaded_by("mlx_kvret.core", *modules)
    assert {"numpy", "safetensors"} <= loaded
    assert not loaded & set(BACKENDS)


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.stem)
def test_core_source_names_nothing_else(path):
    # pictures are opened by Pillow, which is imported when the first one comes
    allowed = (
        sys.stdlib_module_names | {"numpy", "safetensors"} | ({"PIL"} if path.stem == "images" else set())
    )
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                # within core, or the errors beside it
                assert node.level == 1 or (node.level, node.module) == (2, "errors")
                continue
            names = [node.module]
        else:
            continue
        assert {name.partition(".")[0] for name in names} <= allowed
