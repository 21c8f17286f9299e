"""A vision-language model's processor, which makes of text and pictures what the model reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES, processor_class_from_name

from mlx_kvret.core.checkpoint import read_json
from mlx_kvret.core.installed import command_for, missing
from mlx_kvret.core.loading import tried
from mlx_kvret.core.model_folder import model_config
from mlx_kvret.core.picture_prompts import spoken_by
from mlx_kvret.errors import MissingDependencyError, UnsupportedModelError

_NAMED = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")


class NoVideo(dict[str, Any]):
    """In the place of a processor of videos, which needs torchvision; frames are given as pictures.

    A dictionary, for processors write their parts as JSON.
    """

    model_input_names: tuple[str, ...] = ()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise MissingDependencyError(
            "videos need torchvision, which is not installed; give their frames as pictures, in their order"
        )


def read_processor(folder: Path, options: dict[str, Any]) -> Any:
    """The processor in a model folder; without torchvision one of pictures alone.

    Raises:
        MissingDependencyError: it needs a package that is not there.
        UnsupportedModelError: transformers does not know it.
    """
    try:
        found = AutoProcessor.from_pretrained(folder, **options)
        if type(found).__module__.partition(".")[0] == "mlx_vlm":
            # once imported, mlx-vlm answers in transformers' place, with arrays that torch does not take
            found = _processor_class(folder).from_pretrained(folder, **options)
    except (ImportError, ValueError) as error:
        if "orchvision" not in str(error):
            raise _lacking(folder, error) from error
        try:
            found = _of_pictures(_processor_class(folder)).from_pretrained(folder, **options)
        except ImportError as further:
            raise _lacking(folder, further) from further
    tried(found.tokenizer)
    spoken_by(found)
    return found


def _lacking(folder: Path, error: Exception) -> Exception:
    """What to raise: an error that names the package, if one is missing."""
    reason = " ".join(str(error).split()).partition(". ")[0]
    if not isinstance(error, ImportError):
        return error
    if missing("pictures"):
        return MissingDependencyError(
            f"{folder} is a vision-language model, which needs Pillow; run `{command_for('pictures')}`"
        )
    return MissingDependencyError(f"the processor of {folder} needs a package that is not there: {reason}")


def _processor_class(folder: Path) -> Any:
    files = [folder / name for name in _NAMED if (folder / name).exists()]
    named = next((name for file in files if (name := read_json(file).get("processor_class"))), None)
    name = named or PROCESSOR_MAPPING_NAMES.get(str(model_config(folder).get("model_type")))
    found = processor_class_from_name(str(name))
    if found is None:
        raise UnsupportedModelError(f"transformers knows no processor {name!r}, which {folder} needs")
    return found


def _of_pictures(kind: Any) -> Any:
    """A class of processors without the part that reads videos."""

    def arguments(cls: Any, folder: Any, processor_dict: Any = None, **options: Any) -> list[Any]:
        made = {
            "tokenizer": lambda: cls._load_tokenizer_from_pretrained("tokenizer", folder, **options),
            "image_processor": lambda: AutoImageProcessor.from_pretrained(folder, **options),
            "video_processor": NoVideo,
            "feature_extractor": lambda: AutoFeatureExtractor.from_pretrained(folder, **options),
        }
        return [made[name]() for name in cls.get_attributes()]

    def check(self: Any, name: str, argument: Any) -> Any:
        return (
            NoVideo
            if isinstance(argument, NoVideo)
            else kind.check_argument_for_proper_class(self, name, argument)
        )

    own = {"_get_arguments_from_pretrained": classmethod(arguments), "check_argument_for_proper_class": check}
    return type(kind.__name__, (kind,), own)
