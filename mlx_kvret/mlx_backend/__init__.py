"""The MLX backend: the rooms of ``cuda_backend`` under the same names, for Apple Silicon and the CPU."""

import logging

from .blas import HINT, prefer_openblas

# before anything here imports MLX
if not prefer_openblas():
    logging.getLogger("mlx_kvret").info(HINT)
