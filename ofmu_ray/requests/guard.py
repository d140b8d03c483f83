"""What every call of the HTTP service passes before its route: size, rate, token; and what leaves it: headers, a log.

Nothing that a client wrote goes into the log or into an error: no path, query, body, token or exception message.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections import OrderedDict
from http.cookies import CookieError, SimpleCookie
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ofmu_ray.config.requests import ServiceOptions
from ofmu_ray.requests import tokens
from ofmu_ray.requests.ledger import Ledger

LOG = logging.getLogger("ofmu_ray.requests.service")
COOKIE = "ofmu_token"
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; style-src 'self'; img-src data:; form-action 'self'; frame-ancestors 'none'; "
        "base-uri 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}
MOST_CLIENTS = 10_000
"""Rates remembered, of tokens and of addresses each; the longest unused is dropped."""


def refusal(error: HTTPException) -> JSONResponse:
    """The answer to a call that is refused."""
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


class Rates:
    """A token bucket per client: `rate` calls a minute, up to `rate` at once."""

    def __init__(self, rate: int) -> None:
        self.rate = rate
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, client: str, now: float) -> float:
        """0, or the seconds until the client may call again."""
        left, then = self._left.pop(client, (float(self.rate), now))
        left = min(self.rate, left + (now - then) * self.rate / 60)
        wait = 0.0 if left >= 1 else (1 - left) * 60 / self.rate
        self._left[client] = (left - 1 if left >= 1 else left, now)
        if len(self._left) > MOST_CLIENTS:
            self._left.popitem(last=False)
        return wait


class Guard:
    """ASGI middleware. The token found, or why none was, is `scope["state"]["token"]`."""

    def __init__(self, app: ASGIApp, ledger: Ledger, options: ServiceOptions) -> None:
        self.app, self.ledger, self.options = app, ledger, options
        self.rates, self.strangers = Rates(options.rate), Rates(options.rate)  # addresses push out no token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.monotonic(), 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            scope.setdefault("state", {})["token"] = await self._token(scope)
            await self.app(scope, _limited(receive, scope, self.options.largest_body), sending)
        except HTTPException as error:
            if not status:
                await refusal(error)(scope, receive, sending)
        except Exception as error:
            LOG.error("%s at %s", type(error).__name__, _places(error))
            if not status:
                await JSONResponse({"error": "internal error; see the server's log"}, 500)(scope, receive, sending)
        finally:
            _log(scope, status, time.monotonic() - started)

    async def _token(self, scope: Scope) -> tokens.Token | str:
        secret = _secret(scope)
        token = None if secret is None else await run_in_threadpool(tokens.find, self.ledger, secret)
        now, address = time.monotonic(), (scope.get("client") or ["?"])[0]
        if wait := self.rates.take(token.id, now) if token else self.strangers.take(address, now):
            later = {"retry-after": str(int(wait) + 1)}
            raise HTTPException(429, f"more than {self.options.rate} calls a minute", later)
        if token is None:
            return "a bearer token is needed" if secret is None else "this token is not known"
        return token.problem(self.ledger.clock()) or token


def _secret(scope: Scope) -> str | None:
    """The bearer token of a call to the interface, the cookie's of a page."""
    headers = Headers(scope=scope)
    kind, _, value = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer" and value.strip():
        return value.strip()
    if scope["path"].startswith("/v1/"):
        return None
    cookies: SimpleCookie = SimpleCookie()
    try:
        cookies.load(headers.get("cookie", ""))
    except CookieError:
        return None
    return cookies[COOKIE].value if COOKIE in cookies else None


def _limited(receive: Receive, scope: Scope, most: int) -> Receive:
    """`receive` that ends a body of more than `most` bytes, announced or not."""
    too_large = HTTPException(413, f"the body has more than {most} bytes", {"connection": "close"})
    announced = Headers(scope=scope).get("content-length", "0")
    got = 0

    async def receiving() -> Message:
        nonlocal got
        if not announced.isdecimal() or int(announced) > most:
            raise too_large
        message = await receive()
        got += len(message.get("body", b""))
        if got > most:
            raise too_large
        return message

    return receiving


def _places(error: BaseException) -> str:
    """Where an exception was raised; its message may quote what a client sent."""
    frames = traceback.extract_tb(error.__traceback__)
    return " < ".join(f"{frame.filename.rpartition('/')[2]}:{frame.lineno}" for frame in reversed(frames[-6:]))


def _log(scope: Scope, status: int, seconds: float) -> None:
    route: Any = scope.get("route")
    token = scope["state"].get("token")
    who = token.id if isinstance(token, tokens.Token) else "-"
    path = getattr(route, "path", "(no route)")
    LOG.info("%s %s %d %.0f ms %s", scope["method"][:8], path, status, seconds * 1000, who)
