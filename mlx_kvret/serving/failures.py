"""What a client is told when its request cannot be answered, in OpenAI's shape."""

from __future__ import annotations

from typing import Any

from ..errors import KVRetError

_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
}


class Refusal(KVRetError):
    """A request that gets no answer, with the HTTP ``status`` that says why.

    Args:
        param: the field of the request that is wrong.
        code: a name for programs.
        wait: seconds after which to try again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        wait: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.wait = status, param, code, wait

    @property
    def body(self) -> dict[str, Any]:
        """The error object that OpenAI's clients read."""
        kind = _KINDS.get(self.status, "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.wait is None else {"Retry-After": str(self.wait)}


def gone() -> Refusal:
    """Of a request whose client has left; nobody reads it."""
    return Refusal(499, "the client has gone")


def too_late(seconds: float) -> Refusal:
    return Refusal(
        504,
        f"the answer took longer than the server's limit of {seconds:g} s; ask for fewer tokens, or start "
        "the server with a larger --timeout",
        code="timeout",
    )


def stopping() -> Refusal:
    return Refusal(503, "the server is stopping; try again later", code="stopping", wait=10)


def failed(error: BaseException) -> Refusal:
    """Of a step that failed; what exactly, is in the server's log."""
    said = str(error) if isinstance(error, KVRetError) else type(error).__name__
    return Refusal(500, f"generating failed: {said}; the server goes on, try again", code="step_failed")
