"""What is known of vision-language models before one is opened: by their config and their type."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import UnsupportedModelError

REFUSED = {
    "paligemma": "its prompt attends in both directions, so that it cannot be read in parts or evicted from",
    "phi3_v": "it calls MLX's attention directly and numbers its pictures by negative token ids",
    "mllama": "its pictures are cross-attention states, which no token of the text's cache holds",
}
# attention looks both ways inside a picture, which must then lie within one pass
WHOLE_PICTURES = frozenset({"gemma3", "gemma3n", "gemma4", "gemma4_unified"})
# a picture takes fewer rotary positions than tokens
M_ROPE = frozenset(
    {"qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "glm4v", "glm4v_moe"}
)
_VISION = ("vision_config", "img_processor", "vision_tower", "mm_vision_tower", "visual")
_IMAGE_TOKENS = (
    "image_token_id",
    "image_token_index",
    "media_placeholder_token_id",
    "image_context_token_id",
)
_VIDEO_TOKENS = ("video_token_id", "video_token_index")


def has_vision(config: Mapping[str, Any]) -> bool:
    """Whether a model's ``config.json`` tells of a part that sees."""
    return any(config.get(name) for name in _VISION)


def check_vision(model_type: str | None) -> None:
    """Refuse models that would answer wrongly.

    Raises:
        UnsupportedModelError: says why.
    """
    if why := REFUSED.get(str(model_type)):
        raise UnsupportedModelError(f"{model_type} models cannot be bounded: {why}; use another model")


def whole_pictures(model_type: str | None) -> bool:
    """Whether a picture must be read whole in one pass."""
    return str(model_type) in WHOLE_PICTURES


def picture_tokens(config: Any) -> frozenset[int]:
    """Token ids that stand for patches of pictures, or of frames, in a config: an object or a mapping."""
    read = config.get if isinstance(config, Mapping) else lambda name: getattr(config, name, None)
    found = (read(name) for name in (*_IMAGE_TOKENS, *_VIDEO_TOKENS))
    return frozenset(int(token) for token in found if isinstance(token, int) and not isinstance(token, bool))
