"""A context and questions in, answers out, as pipelines of transformers and kvpress are called."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .core.options import check_known
from .core.request import EVICTION
from .core.sampling import SAMPLING
from .errors import ConfigError
from .reading import answer, read

READING = (*EVICTION, "system", "raw")
ANSWERING = ("max_tokens", "rows", *SAMPLING)


class Pipeline:
    """What :func:`pipeline` returns; ``model`` and ``tokenizer`` are those it runs."""

    def __init__(self, model: Any, tokenizer: Any, options: dict[str, Any]) -> None:
        self.model, self.tokenizer, self._options = model, tokenizer, options

    def __call__(
        self,
        context: str | Path | Sequence[str | Path],
        question: str | None = None,
        *,
        questions: Sequence[str] | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """Read a context within the budget, and answer about it.

        Args:
            context: as ``text`` of :func:`mlx_kvret.read`.
            question, questions: one, or a list; the context is read once, and none disturbs the others.
            options: as of :func:`pipeline`, for this call.

        Returns:
            ``{"answer": text}`` for ``question``, ``{"answers": [text, ...]}`` for ``questions``.

        Raises:
            ConfigError: both or none of ``question`` and ``questions``; else as :func:`mlx_kvret.read`.
        """
        if (question is None) == (questions is None):
            raise ConfigError("give question, one text, or questions, a list of them; one of both")
        if isinstance(questions, str):
            raise ConfigError("questions is one text; give it as question, or a list")
        given = _checked(self._options | options)
        cache = read(
            self.model, self.tokenizer, context, **{n: value for n, value in given.items() if n in READING}
        )
        asked = [question] if questions is None else questions
        saying = {name: value for name, value in given.items() if name in ANSWERING}
        answers = answer(self.model, self.tokenizer, cache, asked, **saying)  # type: ignore[arg-type]
        return {"answer": answers[0]} if questions is None else {"answers": answers}


def pipeline(
    model: Any, tokenizer: Any = None, *, gates: Any = "auto", backend: Any = "auto", **options: Any
) -> Pipeline:
    """Something to call with a context and questions: ``pipeline("smollm2", budget=256)(text, "Who?")``.

    Args:
        model: a folder, a hub id or a name known here, which is loaded with ``gates`` on ``backend``; or a
            model that was loaded, with its ``tokenizer``.
        options: ``budget`` and the others of :func:`mlx_kvret.make_cache`, ``system`` and ``raw`` of
            :func:`mlx_kvret.read`, ``max_tokens``, ``temp`` and the others of :func:`mlx_kvret.generate`, and
            ``rows`` of :func:`mlx_kvret.answer`, for all calls.

    Raises:
        ConfigError: an unknown option, or a tokenizer where it is loaded, or none where it is not.
        Else as :func:`mlx_kvret.load`.
    """
    _checked(options)
    if isinstance(model, (str, Path)):
        if tokenizer is not None:
            raise ConfigError("the tokenizer is loaded with the model; drop it, or give a loaded model")
        from .api import load

        model, tokenizer = load(model, gates, backend=backend)
    elif gates != "auto" or backend != "auto":
        raise ConfigError("gates and backend have no effect on a loaded model; attach it with its gates")
    if tokenizer is None:
        raise ConfigError("texts need a tokenizer; give that of the model")
    return Pipeline(model, tokenizer, options)


def _checked(options: dict[str, Any]) -> dict[str, Any]:
    check_known(options, (*READING, *ANSWERING), "a pipeline", {"press": "give policy and budget instead"})
    return options
