"""Models and data of the training tests."""

import pytest

from .chats import write_chats
from .tiny_models import CONFIGS, tiny_model


@pytest.fixture(params=CONFIGS)
def model(request):
    return tiny_model(request.param)


@pytest.fixture(scope="session")
def chats(tmp_path_factory):
    """12 chats of 64 tokens."""
    return write_chats(tmp_path_factory.mktemp("chats") / "chats.jsonl", 12, 64)
