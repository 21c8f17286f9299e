"""Standard tasks by EleutherAI's lm-evaluation-harness (extra ``harness``) with a bounded cache.

``lm_eval.simple_evaluate(BoundedLM("org/model", gates="org/gates", budget=1024), tasks=["gsm8k"])``, or
after :func:`register` the same with ``"kvret", "pretrained=org/model,gates=org/gates,budget=1024"``.
"""

from __future__ import annotations

from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import model_registry, register_model
from tqdm import tqdm

from ..core.options import whole
from ..core.picture_prompts import tokenizer_of
from ..errors import ConfigError
from .engine import PublicEngine
from .likelihood import log_likelihoods
from .methods import Method, parse_method

NAME = "kvret"
_MAX_TOKENS = 256
# what the harness asks for unless told otherwise
_USUAL_DEVICE = "cuda:0"


def register() -> None:
    """Have the harness know :class:`BoundedLM` as its model ``kvret``."""
    import lm_eval.models  # noqa: F401  its own models come first, or not at all

    if NAME not in model_registry:
        register_model(NAME)(BoundedLM)


class BoundedLM(TemplateLM):
    """A model that reads every request into a cache of its own, evicting after each chunk.

    Prompts are never cut off on the left: that they may be long is what the cache is for.

    Args:
        pretrained: folder, hub id, or a name known here (``"demo"``).
        gates: as of :func:`mlx_kvret.load`; "none" for none.
        budget: M, tokens per KV head.
        method: as of ``mlx-kvret eval``: ``learned``, ``learned:threshold=1e-6``, ``recent``, ``full``, …
        backend, chunk, buffer: as of ``mlx-kvret eval``; prompts are read in chunks of half the budget.
        device: of torch; "cuda:0", which the harness itself says by default, is a wish.
        batch_size, max_batch_size: requests are read one by one, so only 1.

    Raises:
        ConfigError: a method that looks at attention or answers, or an option without effect.
    """

    def __init__(
        self,
        pretrained: str,
        gates: str | None = "auto",
        budget: int = 1024,
        method: str = "learned",
        backend: str = "auto",
        chunk: int | None = None,
        buffer: int | None = None,
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        from ..api import choose_backend, load

        if str(batch_size) != "1" or max_batch_size not in (None, 1):
            raise ConfigError("batch sizes have no effect: requests are read one by one; drop them")
        whole("budget", budget, 1)
        chosen = choose_backend(backend)
        network, tokenizer = load(
            pretrained,
            None if gates in (None, "none") else gates,
            backend=chosen,  # type: ignore[arg-type]
            **_device(chosen, device),
        )
        if tokenizer is None:
            raise ConfigError(f"{pretrained} has no tokenizer; standard tasks are texts, copy its files too")
        self.engine = PublicEngine(network, tokenizer, chunk, buffer)
        self.method: Method = parse_method(method)
        self.budget, self.tokenizer = budget, tokenizer_of(tokenizer)
        self._chunk = self.engine.pace.chunk(None if self.method.full else budget)
        # what cannot work is told now
        self._new_cache()

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        start = self.tokenizer.bos_token_id
        return self.eot_token_id if start is None else int(start)

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        start = self.tokenizer.bos_token
        if add_special_tokens is None:
            add_special_tokens = not (start and string.startswith(start))
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        found = []
        for _, context, continuation in tqdm(requests, disable=disable_tqdm, unit="text"):
            cache = self._new_cache()
            self.engine.read(context[:-1], cache, self._chunk)
            logits = self.engine.forward([*context[-1:], *continuation], cache)
            likelihood = log_likelihoods(logits[:1], logits[1:], continuation)
            greedy = logits[:-1].argmax(-1).tolist() == list(continuation)
            found.append((float(likelihood.sum()), greedy))
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, each read from its beginning in one bounded cache."""
        found = []
        for (text,) in tqdm([r.args for r in requests], disable=disable_tqdm, unit="text"):
            ids = [self.prefix_token_id, *self.tok_encode(text, add_special_tokens=False)]
            likelihoods, _ = self.engine.score([ids], self._new_cache(), self._chunk)
            found.append(float(likelihoods.sum()))
        return found

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers up to a stop text, an end token or ``max_gen_toks`` (256 unless given)."""
        return [
            self._generate(context, options)
            for context, options in tqdm([r.args for r in requests], disable=disable_tqdm, unit="text")
        ]

    def _generate(self, context: str, options: dict[str, Any]) -> str:
        if options.get("do_sample") or options.get("temperature"):
            raise ConfigError("this task wants sampling; standard tasks are answered greedily here")
        until = options.get("until") or []
        stops = [until] if isinstance(until, str) else [stop for stop in until if stop]
        ids, cache = self.tok_encode(context) or [self.prefix_token_id], self._new_cache()
        self.engine.read(ids[:-1], cache, self._chunk)
        most = int(options.get("max_gen_toks", _MAX_TOKENS))
        text = self.engine.answer(ids[-1:], cache, most, lambda said: any(stop in said for stop in stops))
        for stop in stops:
            text = text.partition(stop)[0]
        return text

    def _new_cache(self) -> Any:
        return self.engine.new_cache(self.method, self.budget)


def _device(backend: str, device: str | None) -> dict[str, Any]:
    """The option of :func:`mlx_kvret.load`."""
    if device is None or (device == _USUAL_DEVICE and backend != "cuda"):
        return {}
    if backend == "mlx":
        raise ConfigError(f"device {device} has no effect on MLX; drop it, or give backend=torch")
    return {"device": device}
