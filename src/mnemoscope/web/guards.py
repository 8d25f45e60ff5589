"""Who may ask, and how much: the host and the page a request comes from, a token, limits on what is sent."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any
from urllib.parse import parse_qs, parse_qsl, urlencode, urlsplit

from starlette.responses import RedirectResponse, Response

LARGEST_BODY = 64 * 1024  # bytes
LOOKS = ("/report.css", "/static/playground.css", "/static/icon.svg")  # of the page that asks for the token, too

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]
Refuse = Callable[[str, int, str, str], Response]  # path, status, field, message

HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-frame-options", b"DENY"),
]


class Guard:
    """Lets requests through that come from where they may, have the token, and are no larger than the limit.

    Args:
        hosts: names under which the server may be asked; None where any will do.
        token: what whoever asks must know; None where nobody else can reach the server.
        refused: makes the answer to what is not let through.
    """

    def __init__(self, app: App, hosts: Collection[str] | None, token: str | None, refused: Refuse) -> None:
        self.app, self.hosts, self.token, self.refused = app, hosts, token, refused

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        wrong = self._what_is_wrong(scope, headers)
        if wrong:
            await self.refused(scope["path"], *wrong)(scope, receive, send)
            return
        if self._is_entering(scope):
            # The cookie does from now on, and neither the address bar nor the history keeps the token.
            rest = [pair for pair in parse_qsl(scope["query_string"].decode("latin-1")) if pair[0] != "token"]
            entered = RedirectResponse(scope["path"] + (f"?{urlencode(rest)}" if rest else ""), 303)
            entered.raw_headers += [*HEADERS, *self._cookie(scope)]
            await entered(scope, receive, send)
            return
        too_much = False
        read = 0

        async def limited() -> Message:
            nonlocal read, too_much
            message = await receive()
            read += len(message.get("body", b""))
            too_much = too_much or read > LARGEST_BODY
            return {"type": "http.disconnect"} if too_much else message

        async def sending(message: Message) -> None:
            if too_much:  # whatever the application made of half a body
                if message["type"] == "http.response.start":
                    await self.refused(scope["path"], *_TOO_MUCH)(scope, receive, send)
                return
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *HEADERS, *self._cookie(scope)]
            await send(message)

        await self.app(scope, limited, sending)

    def _what_is_wrong(self, scope: Message, headers: dict[str, str]) -> tuple[int, str, str] | None:
        host = _host_of(f"//{headers.get('host', '')}")
        if self.hosts is not None and host not in self.hosts:
            return 400, "host", f"{host!r} is not one of {', '.join(self.hosts)}"
        # A page of the web, or of another server of this machine, can make a browser ask; only following a link to a
        # page of ours is as good as typing it.
        foreign = "origin" in headers and headers["origin"].partition("://")[2] != headers.get("host")
        elsewhere = headers.get("sec-fetch-site") == "cross-site" or foreign
        if elsewhere and not (scope["method"] == "GET" and headers.get("sec-fetch-mode") == "navigate"):
            return 403, "origin", "pages of other sites may not ask"
        if self.token is not None and scope["path"] not in LOOKS and not self._knows(scope, headers):
            return 401, "token", "missing or wrong; open the address that the server printed"
        length = headers.get("content-length", "0")
        return None if length.isdigit() and int(length) <= LARGEST_BODY else _TOO_MUCH

    def _knows(self, scope: Message, headers: dict[str, str]) -> bool:
        cookies = dict(part.strip().partition("=")[::2] for part in headers.get("cookie", "").split(";"))
        given = headers.get("authorization", "").removeprefix("Bearer ").strip()
        return _same(given, self.token) or _same(cookies.get(_name(scope), ""), self._secret) or self._in_query(scope)

    def _is_entering(self, scope: Message) -> bool:
        """Whether a page is asked for with the token in its address."""
        is_page = scope["method"] == "GET" and not scope["path"].startswith("/api")
        return self.token is not None and is_page and self._in_query(scope)

    def _in_query(self, scope: Message) -> bool:
        return _same(parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0], self.token)

    @property
    def _secret(self) -> str:
        """What the cookie holds: any token, in characters that a cookie may have."""
        return hashlib.sha256((self.token or "").encode()).hexdigest()

    def _cookie(self, scope: Message) -> list[tuple[bytes, bytes]]:
        if self.token is None or not self._in_query(scope):
            return []
        return [(b"set-cookie", f"{_name(scope)}={self._secret}; HttpOnly; SameSite=Strict; Path=/".encode())]


_TOO_MUCH = 413, "body", f"at most {LARGEST_BODY} bytes are read"


def _host_of(address: str) -> str:
    """The name in an address; "" where it has none or cannot be read."""
    try:
        return urlsplit(address).hostname or ""
    except ValueError:
        return ""


def _name(scope: Message) -> str:
    """Cookies are shared by all ports of a host."""
    return f"mnemoscope-{(scope.get('server') or ('', 0))[1]}"


def _same(given: str, wanted: str | None) -> bool:
    return hmac.compare_digest(given.encode(), (wanted or "").encode())
