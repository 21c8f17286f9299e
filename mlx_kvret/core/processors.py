"""A model's processor, where a prompt has pictures: that there is one, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import ConfigError, KVRetError
from .picture_prompts import processor_of


def seeing_processor(tokenizer: Any) -> Any:
    """As :func:`processor_of`, where there are pictures.

    Raises:
        ConfigError: it takes none.
    """
    processor = processor_of(tokenizer)
    if not hasattr(processor, "tokenizer"):
        raise ConfigError(
            f"pictures need the model's processor, and this is a {type(processor).__name__}; give what "
            "mlx_kvret.load returns beside the model"
        )
    return processor


@contextmanager
def processing() -> Iterator[None]:
    """What a processor raises, which may be anything, as an error of ours.

    Raises:
        ConfigError: it refuses the prompt.
    """
    try:
        yield
    except KVRetError:
        raise
    except Exception as error:  # processors of many makes
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ConfigError(
            f"the processor refuses the prompt and its pictures: {reason}; change them"
        ) from error
