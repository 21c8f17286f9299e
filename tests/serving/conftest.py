"""Servers that several tests share."""

import pytest

import mlx_kvret

from .running import running


@pytest.fixture(scope="session", params=["mlx", "torch"])
def loaded(request):
    """The demo on one backend."""
    return mlx_kvret.load("demo", backend=request.param)


@pytest.fixture(scope="session")
def demo_mlx():
    return mlx_kvret.load("demo", backend="mlx")


@pytest.fixture(scope="module")
def server(loaded):
    with running(loaded) as made:
        yield made


@pytest.fixture(scope="module")
def mlx_server(demo_mlx):
    with running(demo_mlx) as made:
        yield made
