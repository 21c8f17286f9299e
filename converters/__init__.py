"""Gate checkpoints from one form to another.

``shared``  one folder for every backend (safetensors + json), the form in the middle
``mlx``     the same for MLX alone: one float type, or 8 bits
``torch``   the shared one with the layers' weights stacked, as the torch backend runs them
``trimkv``  gates as TRIM-KV and DBTrimKV release them (writing them needs torch)
"""

from .conversion import Conversion, convert
from .forms import FORMS, detect, load_any

__all__ = ["FORMS", "Conversion", "convert", "detect", "load_any"]

if __name__ == "converters":
    from mlx_kvret.core.checkout import known_as

    known_as(__name__)
