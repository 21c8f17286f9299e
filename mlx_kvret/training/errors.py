"""What can go wrong while gates are trained. See :mod:`mlx_kvret.errors`."""

from __future__ import annotations

from ..errors import KVRetError


class DataError(KVRetError, ValueError):
    """A record or a file of the training data cannot be used."""


class TrainingError(KVRetError, RuntimeError):
    """A run cannot go on; its last checkpoint is whole."""
