"""What a server may be told, checked at its start."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from ..core.options import number, whole
from ..errors import ConfigError

LOOPBACK = ("localhost", "127.0.0.1", "::1")
MOST_BODY = 32 << 20


@dataclass(frozen=True)
class Settings:
    """Who may ask, how much, and for how long.

    Args:
        model: the name under which clients ask for the model.
        host, port: where to listen; port 0 takes a free one.
        api_key: what clients must send; without one only loopback is listened on.
        allowed_hosts: further names that clients may call the server by.
        origins: of web pages that may use the server.
        queue: requests that may wait while as many run as fit.
        max_tokens: the most tokens an answer may have, and of how many it has at most if nothing is said.
        max_prompt: the most tokens a prompt may have.
        temp: temperature of requests that say none.
        timeout: seconds a request may take in all.
        drain: seconds that running requests may go on once the server is told to stop.
        head_time, body_time, write_time: seconds for a request's head, its body, and for a client to take
            what it is sent.
        body: bytes a request may have.
        connections: clients at once.
        page: whether there is a page at ``/``, and notes of what goes of a cache for those who ask.
    """

    model: str
    host: str = "127.0.0.1"
    port: int = 8080
    api_key: str | None = None
    allowed_hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    queue: int = 64
    max_tokens: int = 4096
    max_prompt: int = 1_000_000
    temp: float = 0.0
    timeout: float = 3600.0
    drain: float = 30.0
    head_time: float = 30.0
    body_time: float = 30.0
    write_time: float = 30.0
    body: int = MOST_BODY
    connections: int = 1000
    page: bool = True

    def __post_init__(self) -> None:
        whole("port", self.port, 0, 65535)
        whole("queue", self.queue, 0)
        whole("max_tokens", self.max_tokens, 1)
        whole("max_prompt", self.max_prompt, 1)
        number("temp", self.temp, "a number from 0 (greedy) to 2", 0, 2)
        number("timeout", self.timeout, "seconds, more than 0", 1e-3)
        number("drain", self.drain, "seconds", 0)
        if self.api_key is not None and (not self.api_key or not self.api_key.isascii()):
            raise ConfigError("api_key is empty or not plain ASCII; give a secret of letters and digits")
        if self.api_key is None and not self.local:
            raise ConfigError(
                f"host is {self.host}, which other machines reach, and there is no key; give --api-key, or "
                "listen on 127.0.0.1"
            )
        for origin in self.origins:
            if not origin.startswith(("http://", "https://")) or origin.count("/") != 2:
                raise ConfigError(
                    f"cors_origin is {origin}; expected a page's scheme, name and port, as https://example.org"
                )

    @property
    def local(self) -> bool:
        """Whether only this machine reaches the server."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def names(self) -> frozenset[str] | None:
        """Names that a request's Host may have; None for any, as a key protects a server known by many."""
        if not self.local and not self.allowed_hosts:
            return None
        return frozenset(name.lower() for name in (*LOOPBACK, self.host, *self.allowed_hosts))
