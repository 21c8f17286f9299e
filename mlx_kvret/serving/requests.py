"""What a client may ask, field by field, as OpenAI's API names it."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..core.options import nearest, short
from .failures import Refusal

MOST_STOPS, MOST_TOP_LOGPROBS = 16, 20
Text = Annotated[str, Field(max_length=32 << 20)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
Stop = Annotated[str, Field(min_length=1, max_length=1000)]
Name = Annotated[str, Field(min_length=1, max_length=256)]
# bookkeeping of hosted services, which changes no answer
Bookkeeping = Annotated[Any, Field(default=None, exclude=True)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class TextPart(_Strict):
    type: Literal["text"]
    text: Text


class Url(_Strict):
    url: Text
    detail: Literal["auto", "low", "high"] | None = None


class PicturePart(_Strict):
    # some clients give the URL itself
    type: Literal["image_url"]
    image_url: Url | Text

    @property
    def url(self) -> str:
        return self.image_url if isinstance(self.image_url, str) else self.image_url.url


class Called(_Strict):
    """The function of a tool call that an assistant made."""

    name: Name
    arguments: Text = ""


class ToolCall(_Strict):
    id: str | None = None
    type: Literal["function"] = "function"
    function: Called
    index: int | None = None


class Message(BaseModel):
    # what an answer's message holds comes back in the next request
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[TextPart | PicturePart] | None = None
    name: Name | None = None
    reasoning_content: Text | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content if isinstance(part, TextPart))
        return self.content or ""

    @property
    def pictures(self) -> list[str]:
        """Their URLs."""
        parts = self.content if isinstance(self.content, list) else []
        return [part.url for part in parts if isinstance(part, PicturePart)]


class Function(_Strict):
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Strict):
    type: Literal["function"]
    function: Function


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: bool = False


class PlainText(_Strict):
    type: Literal["text"]


class Asked(_Strict):
    """What both kinds of request have in common."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(ge=1e-3, le=1, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    n: Literal[1] | None = None
    logit_bias: Annotated[dict[str, Bias], Field(max_length=10_000)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    # ours
    kv_budget: Annotated[int, Field(ge=1)] | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    kv_history: bool | None = None

    user: Bookkeeping
    metadata: Bookkeeping
    store: Bookkeeping
    service_tier: Bookkeeping
    safety_identifier: Bookkeeping
    prompt_cache_key: Bookkeeping

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def limit(self) -> int | None:
        """The most tokens of the answer, where the client said."""
        return self.max_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        """How many of the likeliest tokens to tell beside each; None: no probabilities at all."""
        raise NotImplementedError

    @property
    def usage_in_stream(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(Asked):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: Literal[True] | None = None
    response_format: PlainText | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    chat_template_kwargs: dict[str, bool | int | float | str | None] | None = None

    @property
    def limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Asked):
    """``POST /v1/completions``."""

    prompt: Text | list[int] | Annotated[list[Text], Field(min_length=1, max_length=1)]
    logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = None
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None

    @property
    def wanted_logprobs(self) -> int | None:
        return self.logprobs


A = TypeVar("A", bound=Asked)


def parsed(kind: type[A], body: bytes) -> A:
    """A request from the bytes of its body.

    Raises:
        Refusal: 400, which names the first field that is wrong, what it is and what was expected.
    """
    try:
        asked = kind.model_validate_json(body)
    except ValidationError as error:
        raise _refused(kind, error) from None
    except RecursionError:
        raise Refusal(400, "the body is nested too deep; give plain JSON") from None
    if asked.stream_options is not None and not asked.stream:
        raise Refusal(
            400, "stream_options has no effect without stream; drop it or stream", param="stream_options"
        )
    if isinstance(asked, ChatRequest) and asked.top_logprobs is not None and not asked.logprobs:
        raise Refusal(400, "top_logprobs needs logprobs to be true; give both", param="top_logprobs")
    return asked


def _refused(kind: type[Asked], error: ValidationError) -> Refusal:
    problems = error.errors(include_url=False, include_context=False)
    first = problems[0]
    if first["type"] == "json_invalid":
        return Refusal(400, f"the body is no JSON in UTF-8 ({first['msg']}); send a JSON object")
    field = str(first["loc"][0]) if first["loc"] else None
    if media := next(
        (p["input"] for p in problems if p["loc"][-1:] == ("type",) and _is_media(p["input"])), None
    ):
        message = (
            f"messages holds a part of type {media}; this server reads text and pictures only: give parts of "
            "type text, or image_url with a data URL"
        )
        return Refusal(400, message, param=field)
    # of a field that may be several things, the one that fitted furthest
    deepest = max(problems, key=lambda p: (p["loc"][:1] == first["loc"][:1], len(_path(p["loc"]))))
    path = ".".join(map(str, _path(deepest["loc"]))) or "the body"
    if deepest["type"] == "extra_forbidden":
        advice = nearest(path, tuple(kind.model_fields)) if len(deepest["loc"]) == 1 else "drop it"
        return Refusal(400, f"this server knows no field {short(path)}; {advice}", param=field)
    if deepest["type"] == "missing":
        return Refusal(400, f"{path} is missing; give it", param=field)
    wanted = [p["msg"] for p in problems if _path(p["loc"]) == _path(deepest["loc"])]
    said = ", or ".join(dict.fromkeys(text[:1].lower() + text[1:] for text in wanted))
    return Refusal(400, f"{path} is {short(deepest['input'])}: {said}", param=field)


def _path(place: tuple[int | str, ...]) -> list[int | str]:
    """Fields and places in lists, without pydantic's names for the forms that were tried."""
    return [p for p in place if isinstance(p, int) or (p not in _FORMS and re.fullmatch(r"[a-z_]+", p))]


_FORMS = ("str", "int", "float", "bool", "dict")


def _is_media(found: Any) -> bool:
    return found in ("input_image", "image", "input_audio", "video_url", "file")
