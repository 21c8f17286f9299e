"""Vision-language folders to what runs in MLX: a model of mlx-vlm and its processor."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.nn as nn

from ..core.installed import command_for, missing
from ..core.loading import reading_tokenizer
from ..core.model_folder import CONFIG_FILE
from ..core.picture_prompts import spoken_by
from ..core.vision import M_ROPE, check_vision
from ..errors import CheckpointError, KVRetError, MissingDependencyError, UnsupportedModelError

# models of which mlx-vlm reads the settings of the text beside those of the whole
_FLAT = ("qwen2_vl", "qwen2_5_vl")
# what transformers 5 calls the towers of models that mlx-vlm knows by the whole model's name
_TOWERS = {"qwen3_vl_vision": "qwen3_vl", "qwen2_5_vl_vision": "qwen2_5_vl", "qwen2_vl_vision": "qwen2_vl"}


def load_seeing(folder: Path, config: dict[str, Any], lazy: bool, strict: bool, trusted: bool) -> nn.Module:
    """A model without hooks.

    Raises:
        MissingDependencyError: mlx-vlm is not installed.
        UnsupportedModelError: mlx-vlm cannot load it, or it cannot be bounded.
        CheckpointError: it is damaged.
    """
    check_vision(config.get("model_type"))
    if missing("vlm"):
        raise MissingDependencyError(
            f"{folder} is a vision-language model ({config.get('model_type')}), which needs mlx-vlm; run "
            f"`{command_for('vlm')}`, or give text_only=True for its text half"
        )
    if "model_file" in config and not trusted:
        raise UnsupportedModelError(
            f"{folder} brings Python code of its own ({config['model_file']}); give trust_remote_code=True "
            "if you trust it"
        )
    from mlx_vlm.utils import load_model

    try:
        with _readable(folder, config) as shown:
            model: nn.Module = load_model(shown, lazy, strict=strict)
    except KVRetError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} holds no model; expected config.json and safetensors") from error
    except (RuntimeError, MemoryError) as error:
        raise CheckpointError(f"{folder} is damaged ({error!r}); copy or download the model again") from error
    except (Exception, SystemExit) as error:  # model files take a config at its word
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UnsupportedModelError(
            f"mlx-vlm cannot load {folder}: {reason[:300]}; give text_only=True for its text half"
        ) from error
    return model


def read_processor(
    folder: Path, model: nn.Module, trusted: bool = False, options: dict[str, Any] | None = None
) -> Any:
    """A folder's processor as mlx-vlm opens it: a tokenizer, and what makes pixels of pictures.

    Raises:
        CheckpointError: it cannot be opened.
    """
    from mlx_vlm.utils import load_image_processor, load_processor

    given = {"trust_remote_code": trusted} | (options or {})
    stops = getattr(getattr(model, "config", None), "eos_token_id", None)
    with reading_tokenizer(folder):
        processor = load_processor(folder, True, eos_token_ids=stops, **given)
        own = load_image_processor(folder, **given)
    if own is not None:
        processor.image_processor = own
    spoken_by(processor)
    return processor


def meant(config: dict[str, Any]) -> dict[str, Any]:
    """A config with the settings that transformers 5 nests where mlx-vlm does not look."""
    text, vision = config.get("text_config"), config.get("vision_config")
    changed = dict(config)
    if isinstance(text, dict) and isinstance(rope := text.get("rope_parameters"), dict):
        own: dict[str, Any] = {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
        if str(config.get("model_type")).startswith("glm4v"):
            # all of a head, where transformers says nothing; half of it in mlx-vlm
            own["partial_rotary_factor"] = rope.get("partial_rotary_factor", 1.0)
        kind = rope.get("rope_type", "default")
        if kind != "default" or "mrope_section" in rope:
            own["rope_scaling"] = rope | {"type": kind}
        changed["text_config"] = own | {
            name: v for name, v in text.items() if v is not None or name not in own
        }
    if config.get("model_type") in _FLAT and isinstance(text, dict):
        # what the text's config names as the whole does is the whole's
        changed = {name: v for name, v in changed["text_config"].items() if name not in config} | changed
        del changed["text_config"]
    if str(config.get("model_type")) in M_ROPE and isinstance(
        start := config.get("image_start_token_id"), int
    ):
        # GLM's name of what mlx-vlm counts pictures by
        changed.setdefault("vision_start_token_id", start)
    if isinstance(vision, dict) and vision.get("model_type") in _TOWERS:
        changed["vision_config"] = vision | {"model_type": _TOWERS[vision["model_type"]]}
    return changed


@contextlib.contextmanager
def _readable(folder: Path, config: dict[str, Any]) -> Iterator[Path]:
    """The folder, or links to its files beside a config that mlx-vlm reads."""
    changed = meant(config)
    if changed == config:
        yield folder
        return
    with tempfile.TemporaryDirectory() as scratch:
        shown = Path(scratch)
        for path in folder.iterdir():
            if path.name != CONFIG_FILE:
                (shown / path.name).symlink_to(path.resolve())
        (shown / CONFIG_FILE).write_text(json.dumps(changed), encoding="utf-8")
        yield shown
