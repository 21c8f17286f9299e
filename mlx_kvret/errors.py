"""Every error a user can cause, in one place.

Each message says what was found, what was expected and how to mend it. The command line prints it as
one line and exits with status 1; in Python all of them are caught by ``except KVRetError``.
"""

from .core.plain import plain


class KVRetError(Exception):
    """Base class of all errors raised on purpose by mlx-kvret.

    Messages quote files and templates, so as text they are free of control characters.
    """

    def __str__(self) -> str:
        return plain(super().__str__())


class ConfigError(KVRetError, ValueError):
    """An option or a configuration file holds a value that cannot work."""


class CheckpointError(KVRetError, ValueError):
    """A gate checkpoint is damaged, incomplete, of another format version or unsafe to open."""


class ModelMismatchError(KVRetError, ValueError):
    """Gates or a saved cache belong to another model than the one they were given to."""


class UnsupportedModelError(KVRetError, ValueError):
    """The architecture cannot be hooked without giving wrong results."""


class UnsupportedFeatureError(KVRetError, RuntimeError):
    """The feature does not work with a bounded cache; going on would be silently wrong."""


class CacheError(KVRetError, RuntimeError):
    """A cache was used in a way that would break its invariants."""


class RankError(KVRetError, RuntimeError):
    """Processes that work together cannot go on: one is gone, late, or has decided otherwise."""


class RankLost(RankError):
    """One of several processes is gone, or how far it is cannot be told: none of them can go on."""


class OutOfMemoryError(CacheError, MemoryError):
    """A forward pass does not fit into memory; the cache is as it was before it."""


class KernelError(KVRetError, RuntimeError):
    """A kernel cannot be built or run on this machine."""


class MissingDependencyError(KVRetError, ImportError):
    """A package that this call needs is not installed."""


class DataError(KVRetError, ValueError):
    """A record or a file of training data cannot be used."""


class TrainingError(KVRetError, RuntimeError):
    """A training run cannot go on; its last checkpoint is whole."""
