"""Refusal of requests that a web page sends without its reader's wish, by Host, Origin and content type."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable
from typing import Final
from urllib.parse import urlsplit

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from serving.gateway.openai_api import ApiError

JSON_TYPE: Final = "application/json"

_HOST: Final = re.compile(r"(?P<name>\[[0-9a-fA-F:.]+\]|[^\[\]:/@\s]+)(:(?P<port>[0-9]{1,5}))?")
_DEFAULT_PORTS: Final = {"http": 80, "https": 443}


class OriginGuard:
    """ASGI middleware: answers a request that breaks a rule of this module before the application sees it."""

    def __init__(self, app: ASGIApp, trusted: frozenset[str]) -> None:
        """Guard `app`. `trusted` holds the host names that are ours, as `trusted_names` makes them."""
        self._app, self._trusted = app, trusted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 403 or 415, or pass the request on."""
        error = refusal(scope["method"], Headers(scope=scope), self._trusted) if scope["type"] == "http" else None
        if error is None:
            await self._app(scope, receive, send)
        else:
            response = JSONResponse(error.body, status_code=error.status, headers=error.headers)
            await response(scope, receive, send)


def trusted_names(allowed_hosts: Iterable[str]) -> frozenset[str]:
    """Return the names this machine goes by, and the allowed ones, as `host_parts` spells them."""
    own = ("localhost", socket.gethostname(), socket.getfqdn())
    return frozenset(_plain(name) for name in (*own, *allowed_hosts) if name)


def refusal(method: str, headers: Headers, trusted: frozenset[str]) -> ApiError | None:
    """Return why a request is refused; None when it may pass."""
    # A page in the operator's browser reaches 127.0.0.1, too. It can post text/plain anywhere without asking (a
    # "simple" request of the Fetch standard), but JSON only after a preflight, which nobody here answers. Or it lets
    # its own host name resolve to this machine (DNS rebinding), which makes the gateway its own origin.
    return _host_refusal(headers, trusted) or _origin_refusal(headers) or _media_refusal(method, headers)


def host_parts(text: str) -> tuple[str, int | None] | None:
    """Split a Host header into its name, lower-case and without brackets or final dot, and its port; None for nonsense.

    Example: host_parts("[::1]:8000") == ("::1", 8000)
    """
    found = _HOST.fullmatch(text)
    if found is None:
        return None
    return _plain(found["name"]), int(found["port"]) if found["port"] else None


def is_address(name: str) -> bool:
    """Whether a host is an IP literal."""
    # It resolves to nothing else, so no name server can rebind it.
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _host_refusal(headers: Headers, trusted: frozenset[str]) -> ApiError | None:
    given = headers.getlist("host")
    # Of two Host headers nobody knows which one the browser meant.
    parts = host_parts(given[0]) if len(given) == 1 else None
    if parts is not None and (is_address(parts[0]) or parts[0] in trusted):
        return None
    remedy = "it is no name of this gateway; use its IP address, or add the name to the gateway's allowed_hosts"
    return _forbidden("host", ", ".join(given), remedy, code="host_not_allowed")


def _origin_refusal(headers: Headers) -> ApiError | None:
    given = headers.getlist("origin")
    if not given or (len(given) == 1 and _same_host(given[0], headers["host"])):
        return None
    remedy = "a page of another host may not speak to this gateway; call it from a program, or serve the page from here"
    return _forbidden("origin", ", ".join(given), remedy, code="origin_not_allowed")


def _same_host(origin: str, host: str) -> bool:
    """Whether an origin ("http://gw:8000") names the host ("gw:8000"); "null" and what cannot be read never do."""
    try:
        scheme, authority = urlsplit(origin)[:2]
    except ValueError:
        return False
    # Ports count too: another application of the same machine is another origin.
    ours, theirs, port = host_parts(host), host_parts(authority), _DEFAULT_PORTS.get(scheme)
    if ours is None or theirs is None or port is None:
        return False
    return (ours[0], ours[1] or port) == (theirs[0], theirs[1] or port)


def _media_refusal(method: str, headers: Headers) -> ApiError | None:
    given = headers.getlist("content-type")
    if method != "POST" or (len(given) == 1 and given[0].partition(";")[0].strip().lower() == JSON_TYPE):
        return None
    message = f"content-type = {', '.join(given)!r}: send the body as {JSON_TYPE}"
    return ApiError(415, message, code="unsupported_media_type", param="content-type", may_retry=False)


def _forbidden(header: str, value: str, remedy: str, *, code: str) -> ApiError:
    return ApiError(403, f"{header} = {value!r}: {remedy}", code=code, param=header, may_retry=False)


def _plain(name: str) -> str:
    return name.strip("[]").rstrip(".").lower()
