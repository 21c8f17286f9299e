"""The folder that several files of tests open, made once."""

import pytest

from . import folders


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A tiny random Qwen3-VL."""
    return folders.qwen3_vl(tmp_path_factory.mktemp("qwen3_vl"))
