"""Options of the loaders, checked before anything is read or fetched; the same words for every backend."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ConfigError, KVRetError
from .options import check_known, of_type, whole

_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "revision": ((str,), "the name of a branch, a tag or a commit"),
    "gates_revision": ((str,), "the name of a branch, a tag or a commit"),
    "adapter_path": ((str, Path), "a folder or a hub id"),
    "trust_remote_code": ((bool,), "true or false"),
    "tokenizer_config": ((dict,), "a dictionary of the tokenizer's own options"),
    "model_config": ((dict,), "a dictionary of entries of config.json"),
    "lazy": ((bool,), "true or false"),
    "strict": ((bool,), "true or false"),
    "compile": ((bool,), "true or false"),
}


def check_loading(
    load: Callable[..., Any],
    given: Mapping[str, Any],
    unknown: Mapping[str, Any],
    elsewhere: Mapping[str, str],
) -> None:
    """Refuse options that a backend's loader does not know, and values of the wrong type.

    Args:
        load: the loader; its own named parameters are what it knows.
        given: options it knows, of which None is not given.
        unknown: the others.
        elsewhere: options of other backends, and why they do nothing on this one.

    Raises:
        ConfigError: names the option, and the nearest that is known.
    """
    known = [
        name
        for name, parameter in inspect.signature(load).parameters.items()
        if parameter.kind != parameter.VAR_KEYWORD
    ]
    check_known(unknown, [*known, "backend"], "load", elsewhere)
    for name, value in given.items():
        if value is not None and name in _KINDS:
            of_type(name, value, *_KINDS[name])
    named = isinstance(given.get("gates"), (str, Path)) and given.get("gates") != "auto"
    if given.get("gates_revision") is not None and not named:
        raise ConfigError("gates_revision is given, and no gates from the hub; drop it, or give their hub id")
    if given.get("rope_length") is not None:
        whole("rope_length", given["rope_length"], 1)


def check_parallel(parallel: str | None, others: Mapping[str, Any]) -> None:
    """Refuse a way of splitting a model that there is not, and options that do not go with it.

    Raises:
        ConfigError: says which.
    """
    if parallel is None:
        return
    if parallel not in ("tensor", "pipeline"):
        raise ConfigError(f"parallel is {parallel!r}; expected 'tensor' (by heads) or 'pipeline' (by layers)")
    if given := [name for name, value in others.items() if value]:
        raise ConfigError(f"{given[0]} does not work with parallel={parallel!r}; drop one of them")


def check_needless(tokenizer_config: Mapping[str, Any] | None, folder: Path) -> None:
    """Refuse options of a tokenizer that is not there."""
    if tokenizer_config:
        raise ConfigError(f"tokenizer_config is given, and {folder} has no tokenizer; drop it")


def required(tokenizer: Any, folder: Path) -> Any:
    """A model folder's tokenizer.

    Raises:
        CheckpointError: there is none.
    """
    if tokenizer is None:
        raise CheckpointError(f"{folder} has no tokenizer, so no text can be read; add its tokenizer's files")
    return tokenizer


@contextlib.contextmanager
def reading_tokenizer(whose: str | Path) -> Iterator[None]:
    """Errors of a tokenizer, which may be of any make and of any kind, as one that names the model.

    Args:
        whose: the model's folder, or words for it.

    Raises:
        CheckpointError: instead of anything but an error of ours or an interrupt.
    """
    try:
        yield
    except KVRetError:
        raise
    except BaseException as error:
        # what goes wrong in Rust is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise CheckpointError(
            f"the tokenizer of {whose} cannot be loaded or used ({type(error).__name__}: {reason[:200]}); "
            "copy or download it again"
        ) from error


def tried(tokenizer: Any) -> Any:
    """The tokenizer, once it has been through a word: some are damaged in a way that shows in use only."""
    tokenizer.decode([int(token) for token in tokenizer.encode("a")])
    return tokenizer
