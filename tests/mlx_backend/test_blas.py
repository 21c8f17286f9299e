"""MLX on Linux computes with OpenBLAS once the package is imported, and it is told where there is none."""

import subprocess
import sys

import pytest

from mlx_kvret.mlx_backend import blas

TELL = """
import ctypes
import mlx_kvret.mlx_backend
import mlx.core as mx
mx.eval(mx.ones((64, 64)) @ mx.ones((64, 64)))
loaded = open("/proc/self/maps").read()
front = ctypes.CDLL(None)
print("libopenblas" in loaded, hasattr(front, "openblas_get_config"))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere MLX has a fast BLAS of its own")
@pytest.mark.skipif(not blas.found(), reason="OpenBLAS is not installed")
def test_openblas_is_in_front_without_any_setting():
    done = subprocess.run([sys.executable, "-c", TELL], capture_output=True, text=True, check=True, env={})
    assert done.stdout.split() == ["True", "True"]


def test_where_there_is_none(monkeypatch):
    monkeypatch.setattr(blas.sys, "platform", "linux")
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    monkeypatch.setattr(blas.ctypes, "CDLL", _missing)
    assert not blas.prefer_openblas()
    monkeypatch.setattr(blas.sys, "platform", "darwin")
    assert blas.prefer_openblas()


def _missing(name, mode):
    raise OSError(name)
