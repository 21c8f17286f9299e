import mlx.core as mx
import pytest


@pytest.fixture(autouse=True)
def _seed():
    """Every test starts from the same random state."""
    mx.random.seed(0)


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    """Small caches are split too: heads are cut, and pieces cross heads."""
    monkeypatch.setattr("mlx_kvret.mlx_backend.kernels.decode_attention.PIECE_BYTES", 1024)
