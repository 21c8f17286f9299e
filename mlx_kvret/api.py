"""The public functions. Each finds the backend a model belongs to and hands the call on."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from .core.installed import APPLE_SILICON, PACKAGES, command_for, driver_there, installed, missing
from .core.streams import closed_at_exit
from .errors import ConfigError, MissingDependencyError
from .noted import note, notes_of

Backend = Literal["auto", "mlx", "cuda", "torch"]


def load(
    model: str | Path, gates: Any = "auto", *, backend: Backend = "auto", **options: Any
) -> tuple[Any, Any]:
    """A model ready to generate within a budget, and its tokenizer.

    Args:
        model: a model folder, a hub id (``org/name``), or a name known here: ``"demo"``, shipped with the
            package, or ``"smollm2"``, a real model (once ``mlx-kvret get smollm2`` has fetched it).
        gates: a gate folder or hub id in any form, or a ``GateCheckpoint``; None for none, with which only
            policies that need none work. ``"auto"`` takes those that are known for the model, shipped here or
            released and fetched from the hub, if it surely is their base or a copy in other bits. What is
            taken, or why nothing is, goes to the log ``mlx_kvret``.
        backend: ``"mlx"``, ``"cuda"``, ``"torch"`` (CPU), or ``"auto"``: MLX on Apple Silicon, CUDA where
            torch sees a GPU, else whichever is installed, MLX first.
        revision, gates_revision: branch, tag or commit of a hub repository, main unless given.
        trust_remote_code: run the Python code that the model's folder brings; never unless given.
        tokenizer_config: a dictionary of options of the tokenizer.
        parallel: of several processes that ``mlx.launch`` or ``torchrun`` has started, hold the model
            together: ``"tensor"`` splits its heads, ``"pipeline"`` (MLX) its layers. See docs/ranks.md.
        options: of the backend's own loader: ``adapter_path``, ``lazy``, ``strict``, ... on MLX,
            ``device``, ``dtype``, ``quantization_config``, ... on torch; see ``load`` in its ``backend``.

    Returns:
        ``(model, tokenizer)``; the tokenizer is None if the folder has none: prompts are then token ids. Of a
        vision-language model it is the processor, which has the tokenizer.

    Raises:
        ConfigError, CheckpointError, ModelMismatchError, UnsupportedModelError, MissingDependencyError.
    """
    return _backend(choose_backend(backend)).load(model, gates, **_device(backend, options))


def attach(model: Any, gates: Any = "auto", **options: Any) -> Any:
    """Hook a model that was loaded by mlx-lm or transformers; returns the same model.

    From then on mlx-lm's own functions, and transformers' ``model.generate``, use a bounded cache where they
    are not given another one: made with these options, or the defaults.

    Args:
        gates: as of :func:`load`. Without gates and options nothing says how to bound a cache: mlx-lm's
            functions and ``model.generate`` are then refused until they are given one from
            :func:`make_cache`.
        options: ``budget``, ``buffer`` and the others of :func:`make_cache`, whose defaults they are too.

    Raises:
        ConfigError: options that cannot work, or that need gates.
        CheckpointError, ModelMismatchError, UnsupportedModelError: the model stays as it was.
    """
    return backend_of(model).attach(model, gates, **options)


def detach(model: Any) -> Any:
    """Undo :func:`attach` completely; returns the same model."""
    return backend_of(model).detach(model)


def make_cache(model: Any, budget: int | str | None = None, buffer: int | None = None, **options: Any) -> Any:
    """An empty cache of a fixed size, for the model's own calls and for :func:`generate`.

    ``model(tokens, cache=cache)`` (MLX, and torch with transformers from 5.24 on, before that
    ``past_key_values=cache``) runs one forward pass and then any eviction that is due. With no option given
    the cache is what the model was attached for. ``cache.kept_positions()``, ``cache.entries``,
    ``cache.seen`` and ``cache.nbytes`` tell what is held.

    A call reads all of its tokens or, whatever exception or interrupt ends it, none: ``cache.seen`` tells
    which, or the cache refuses to go on with a CacheError that says why. On MLX the call returns when its
    tokens are computed; only mlx-lm's own loops run ahead of the device. What MLX fails at after a call,
    while someone computes the logits of a long chunk, leaves the chunk in the cache.

    Only the model that it was made for, attached with the same gates, can use a cache, and copies of it.

    Args:
        budget: M in tokens per KV head, or memory: ``"256MB"``; 1024 unless given.
        buffer: B, tokens per head it may grow beyond M before a compaction; M/8 unless given.
        options: of :class:`~mlx_kvret.core.config.EvictionConfig`: ``scope``, ``policy``, ``min_per_head``,
            ``sinks``, ``window``, ``lookahead``, ``threshold``, ``policy_seed``; ``kv_bits``: kept keys and
            values in 8 bits, 4, or ``"k8v4"``.
    """
    return backend_of(model).make_cache(model, budget, buffer, **options)


def generate(model: Any, tokenizer: Any, prompt: Any, **options: Any) -> str:
    """The text a model goes on with after a prompt, however long, within a fixed KV budget.

    Args:
        tokenizer: what :func:`load` returns beside the model; of a vision-language model its processor.
        prompt: text; token ids as a list, or an array of numpy, torch or MLX, (n,) or (1, n); what
            ``apply_chat_template`` returns; or messages, which are read through the chat template. Parts of
            messages may be pictures (:mod:`~mlx_kvret.core.picture_prompts`).
        images: pictures beside a text or messages, of a vision-language model: files, data URLs, images of
            PIL or arrays. A text has them where it says ``<image>``, or first.
        budget, buffer and eviction options: as of :func:`make_cache`.
        max_tokens: the most tokens to generate (256).
        cache: a cache to go on with, whose tokens come before the prompt; instead of ``budget`` and the like.
        temp, top_p, top_k, min_p, seed, ...: draw tokens instead of taking the likeliest.
        logit_bias, repetition_penalty, ...: change the logits first. These and those are mlx-lm's, on every
            backend: :class:`~mlx_kvret.core.sampling.Sampling` has them all.
        sampler: log probabilities (1, V) to a token (1,), instead of ``temp`` and the like.
        logits_processors: functions of the tokens and the logits that return logits.
        prefill_step_size: tokens of the prompt read in one forward pass (2048).
        prompt_progress_callback: called with tokens read and tokens in all.
        verbose: print the text as it comes, and figures at the end.
        options: on MLX ``draft_model`` and ``num_draft_tokens``, as of mlx-lm.

    However it ends (``max_tokens``, an end token, a closed iterator, an exception), a given ``cache`` has
    then seen every token of the prompt and of the answer that was given out, the last one and an end token
    too: ``cache.seen`` is what it was before, plus the prompt, plus the tokens of the responses. If the
    prompt was broken off, it has seen the chunks that were read. torch's own ``model.generate`` and mlx-lm's
    functions keep this too.

    Raises:
        ConfigError: a prompt or an option that cannot work; a misspelt option names the nearest.
        ModelMismatchError: ``cache`` belongs to another model, or to this one with other gates or weights.
        OutOfMemoryError: names a ``prefill_step_size`` that fits; the cache is as it was before the pass.
        CacheError: the cache cannot go on, and why.
    """
    return str(backend_of(model).generate(model, tokenizer, prompt, **options))


def stream_generate(model: Any, tokenizer: Any, prompt: Any, **options: Any) -> Iterator[Any]:
    """As :func:`generate`, by token: mlx-lm's response fields, ``seen``, ``entries`` and ``cache_nbytes``."""
    return closed_at_exit(backend_of(model).stream_generate(model, tokenizer, prompt, **options))


def save_cache(model: Any, cache: Any, path: str | Path, notes: dict[str, str] | None = None) -> None:
    """Write a cache to a file, whole or not at all, with texts to be kept beside it.

    Without ``notes`` they are those of :func:`mlx_kvret.read`, if the cache has read nothing else since.
    Either backend opens the file (:mod:`mlx_kvret.core.snapshot`): a server's reading goes on on a laptop.
    """
    backend_of(model).save_cache(model, cache, path, notes_of(cache) if notes is None else notes)


def load_cache(model: Any, path: str | Path) -> tuple[Any, dict[str, str]]:
    """A saved cache of this model and its gates, ready to go on, and the texts saved beside it.

    Raises:
        CheckpointError: not such a file, or damaged.
        ModelMismatchError: it belongs to another model or other gates.
    """
    cache, notes = backend_of(model).load_cache(model, path)
    note(cache, notes)
    return cache, notes


def backends() -> dict[str, str]:
    """Each backend and ``"ok"``, or what is missing and the command that mends it."""
    return {name: _state(name) for name in PACKAGES}


def _state(backend: str) -> str:
    if lacking := missing(backend):
        return f"{', '.join(lacking)} not installed; run `{command_for(backend)}`"
    if backend == "cuda" and not _sees_gpu():
        return "torch sees no GPU; use backend torch for the CPU"
    return "ok"


def choose_backend(backend: str) -> str:
    """The backend that ``"auto"`` means here; a given one is checked.

    torch is imported only where it may have a GPU.

    Raises:
        ConfigError: no such backend, or no GPU for ``"cuda"``.
        MissingDependencyError: what it needs is not installed.
    """
    if backend == "auto":
        for name in ("mlx", "cuda", "torch") if APPLE_SILICON else ("cuda", "mlx", "torch"):
            if _state(name) == "ok":
                return name
        raise MissingDependencyError(
            f"no backend is installed; run `{command_for('mlx')}` for MLX, or `{command_for('torch')}`"
        )
    if backend not in PACKAGES:
        raise ConfigError(f"backend is {backend!r}; expected auto, {', '.join(PACKAGES)}")
    if (state := _state(backend)) == "ok":
        return backend
    raise (MissingDependencyError if missing(backend) else ConfigError)(f"backend {backend}: {state}")


def _sees_gpu() -> bool:
    if not driver_there():
        return False
    import torch

    return bool(torch.cuda.is_available())


def _device(backend: str, options: dict[str, Any]) -> dict[str, Any]:
    chosen = choose_backend(backend)
    if chosen == "mlx" or options.get("device_map") is not None or options.get("parallel") is not None:
        return options
    return {"device": "cuda" if chosen == "cuda" else "cpu"} | options


def _backend(backend: str) -> Any:
    if backend == "mlx":
        return importlib.import_module("mlx_kvret.mlx_backend.api")
    if (ours := sys.modules.get("mlx_kvret.cuda_backend.api")) is not None:
        return ours
    # before anything of theirs is imported, which may be there under another name
    importlib.import_module("mlx_kvret.cuda_backend.versions").check_versions()
    return importlib.import_module("mlx_kvret.cuda_backend.api")


def any_backend() -> Any:
    """The backend of whatever is installed, for questions that every one of them answers alike."""
    return _backend("mlx" if installed("mlx") else choose_backend("auto"))


def backend_of(model: Any) -> Any:
    """The backend of a loaded model, told by the class it inherits from."""
    families = {cls.__module__.partition(".")[0] for cls in type(model).__mro__}
    if "mlx" in families:
        return _backend("mlx")
    if "torch" in families:
        return _backend("torch")
    raise ConfigError(
        f"model is a {type(model).__name__}; expected one from mlx_kvret.load, mlx_lm.load or transformers"
    )
