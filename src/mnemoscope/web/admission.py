"""Which requests are answered: those of our own pages and of programs that know the token."""

from __future__ import annotations

import secrets

from starlette.authentication import AuthCredentials, AuthenticationBackend, AuthenticationError, SimpleUser
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection
from starlette.responses import Response

LARGEST_BODY = 64 * 1024  # bytes
OPEN = ("/report.css", "/static/playground.css", "/static/icon.svg")  # the page that asks for the token needs them
ENTRANCE = "/"  # the one page that takes the token from its address


class RefusedError(AuthenticationError, HTTPException):
    """A request that is not answered, with its status and "field: message"."""


class Admission(AuthenticationBackend):
    """Refuses requests of other sites' pages, without the token, or with a large body."""

    def __init__(self, token: str) -> None:
        self._token = token

    async def authenticate(self, conn: HTTPConnection) -> tuple[AuthCredentials, SimpleUser]:
        """Check one request.

        Raises:
            RefusedError: it comes from another site (403), lacks the token (401), or is too large (411, 413).
        """
        headers, path = conn.headers, conn.url.path
        origin = headers.get("origin")
        foreign = origin is not None and origin.partition("://")[2] != headers.get("host")
        foreign = foreign or headers.get("sec-fetch-site", "none") not in ("same-origin", "none")
        # Of what a page of another site can make a browser do, only following a link is as good as typing an address.
        if foreign and not (conn.scope.get("method") == "GET" and headers.get("sec-fetch-mode") == "navigate"):
            raise RefusedError(403, "origin: pages of other sites may not ask")
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        given = [bearer if scheme.lower() == "bearer" else "", conn.cookies.get(_cookie_name(conn), "")]
        given += [conn.query_params.get("token", "")] if path == ENTRANCE else []
        if path not in OPEN and not any(secrets.compare_digest(g.encode(), self._token.encode()) for g in given):
            raise RefusedError(401, "token: missing or wrong")
        if "transfer-encoding" in headers:
            raise RefusedError(411, "body: its length must be given")
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > LARGEST_BODY:
            raise RefusedError(413, f"body: at most {LARGEST_BODY} bytes are read")
        return AuthCredentials(), SimpleUser("")


def remember(token: str, conn: HTTPConnection, response: Response) -> None:
    """Give the browser the token as a cookie that scripts cannot read and other sites' pages do not send."""
    response.set_cookie(_cookie_name(conn), token, httponly=True, samesite="strict")


def _cookie_name(conn: HTTPConnection) -> str:
    """Named by the port in the address: browsers share cookies between all ports of a host."""
    return f"mnemoscope-{conn.url.port}"
