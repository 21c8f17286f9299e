"""A file from the network: gone on with where it was broken off, taken only if its hash is the right one."""

from __future__ import annotations

import hashlib
import http.client
import json
import urllib.error
import urllib.request
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..errors import ConfigError

_BLOCK = 1 << 20
_TIMEOUT = 60
_FAILURES = (OSError, http.client.HTTPException, ValueError)


def fetch(url: str, target: Path, sha256: str, advice: str) -> Path:
    """Download a file, unless it is there already.

    Proxies and certificates are those of the environment (``HTTPS_PROXY``, ``SSL_CERT_FILE``). What was
    received before a failure stays beside ``target`` and is gone on with the next time.

    Args:
        sha256: of the whole file, hexadecimal.
        advice: what to do where there is no network, for messages.

    Raises:
        ConfigError: it cannot be had, or it is another file.
    """
    if target.exists():
        require_hash(target, sha256, f"delete {target} and try again")
        return target
    part = target.with_name(target.name + ".part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _receive(url, part)
    except _FAILURES as error:
        raise ConfigError(
            f"{url} cannot be downloaded ({_reason(error)}); try again, it goes on where it stopped, "
            f"or {advice}"
        ) from error
    try:
        require_hash(part, sha256, advice)
    except ConfigError:
        part.unlink()
        raise
    part.replace(target)
    return target


def read_json(url: str, advice: str) -> dict[str, Any]:
    """A JSON object from the network. Raises as :func:`fetch`."""
    try:
        with urllib.request.urlopen(_request(url), timeout=_TIMEOUT) as answer:
            data = json.load(answer)
    except _FAILURES as error:
        raise ConfigError(
            f"{url} cannot be read ({_reason(error)}); check the network, or {advice}"
        ) from error
    if not isinstance(data, dict):
        raise ConfigError(f"{url} holds a {type(data).__name__}, expected an object; {advice}")
    return data


def file_hash(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def require_hash(path: Path, sha256: str, advice: str) -> None:
    """Refuse a file with another content."""
    if (found := file_hash(path)) != sha256:
        raise ConfigError(
            f"{path.name} is another file than expected: its SHA-256 is {found}, expected {sha256}; {advice}"
        )


def _receive(url: str, part: Path) -> None:
    have = part.stat().st_size if part.exists() else 0
    headers = {"Range": f"bytes={have}-"} if have else {}
    try:
        answer = urllib.request.urlopen(_request(url, headers), timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            return  # all of it was there
        raise
    with answer:
        resumed = answer.status == http.client.PARTIAL_CONTENT
        have = have if resumed else 0
        left = answer.headers.get("Content-Length")
        total = have + int(left) if left else None
        # None: no bar where there is no terminal
        bar = tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=part.stem, disable=None)
        with part.open("ab" if resumed else "wb") as file, bar:
            while block := answer.read(_BLOCK):
                file.write(block)
                bar.update(len(block))
        if total is not None and part.stat().st_size < total:
            raise OSError("the connection ended early")


def _request(url: str, headers: dict[str, str] | None = None) -> urllib.request.Request:
    agent = {"User-Agent": f"mlx-kvret/{version('mlx-kvret')}"}
    return urllib.request.Request(url, headers=agent | (headers or {}))


def _reason(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
