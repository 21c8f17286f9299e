"""A tiny language model with trained gates, so that everything can be tried without a download.

``MODEL``  Hugging Face folder of a Qwen3-architecture model with 161k parameters and 198 words
``GATES``  its retention gates, as a shared gate checkpoint
``STORY``  a prompt of 4,096 tokens that states 16 facts among 512 false ones

The words are explained in :mod:`mlx_kvret.demo.language`; ``python examples/train_demo`` made the files.

The same model with eyes, a Qwen3-VL whose pictures are explained in :mod:`mlx_kvret.demo.pictures`:

``VISION_MODEL``   its folder (``python examples/train_vision`` made it)
``VISION_GATES``   its gates (``python examples/vision.py``)
``VISION_SAMPLE``  a picture of 96 × 96 pixels that states four facts among five false ones
"""

from pathlib import Path

_HERE = Path(__file__).parent
MODEL, GATES, STORY = _HERE / "model", _HERE / "gates", _HERE / "story.txt"
VISION_MODEL, VISION_GATES, VISION_SAMPLE = _HERE / "eyes", _HERE / "eyes_gates", _HERE / "album.png"
