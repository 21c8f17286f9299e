"""What several files of tests open: a model's folder, made once, and records."""

import pytest

from . import folders, records


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A tiny random Qwen3-VL."""
    return folders.qwen3_vl(tmp_path_factory.mktemp("qwen3_vl"))


@pytest.fixture
def album(tmp_path):
    """The file of :func:`.records.album`."""
    return records.album(tmp_path)
