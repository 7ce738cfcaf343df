"""What is let in, and what a page may load: the one place that every request passes."""

import hmac
import json
from collections.abc import Mapping
from hashlib import sha256
from typing import Any
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers
from starlette.requests import cookie_parser
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOCAL = ("127.0.0.1", "localhost", "::1")
COOKIE = "perdure_token"
_POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; connect-src 'self' data: blob:; "
    "frame-ancestors 'self'; form-action 'self'; base-uri 'self'"
)
"""Whatever a library's page would like to have from elsewhere, the browser does not fetch it."""
_HEADERS = {
    b"content-security-policy": _POLICY.encode(),
    b"referrer-policy": b"no-referrer",
    b"x-content-type-options": b"nosniff",
}
_PAGE, _OURS = "/gradio_api/", "/api/"
_LONGEST_EVENT = 4_000_000  # bytes of what a page sends beside files
_BEYOND = "the request is larger than this app takes: give less at a time, or start it with a higher --max-upload"


class Gate:
    """Refuses what comes from other sites, is too large, or needs a token.

    Args:
        app: what is behind it.
        host: that the app listens on.
        token: asked for by what writes to this machine; without one that is open to a local host, and closed to others.
        most: bytes of a request.
    """

    def __init__(self, app: ASGIApp, host: str, token: str, most: int) -> None:
        self.app, self.host, self.token, self.most = app, host, token, most
        self.local = host in LOCAL

    @property
    def closed(self) -> bool:
        """Whether nobody may upload or teach."""
        return not self.local and not self.token

    def opens(self, headers: Mapping[str, str]) -> bool:
        """Whether who sends these headers (names in lower case) may upload and teach."""
        if not self.token:
            return self.local
        bearer = headers.get("authorization", "").removeprefix("Bearer ")
        cookie = cookie_parser(headers.get("cookie", "")).get(COOKIE, "")  # also beside what other ports have set
        pairs = (bearer, self.token), (cookie, _pass(self.token))
        return any(hmac.compare_digest(given.encode(), wanted.encode()) for given, wanted in pairs)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                kept = [each for each in message.get("headers", []) if each[0].lower() not in _HEADERS]
                message["headers"] = [*kept, *_HEADERS.items()]
            await send(message)

        headers = Headers(scope=scope)
        given = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("token", [""])[0]
        if self.token and given and scope["method"] == "GET" and scope["path"] == "/":
            answer: Response = RedirectResponse("/", 303)
            if hmac.compare_digest(given.encode(), self.token.encode()):
                answer.set_cookie(COOKIE, _pass(self.token), httponly=True, samesite="strict")
            await answer(scope, receive, sending)
            return
        if refused := self._refused(scope, headers):
            await refused(scope, receive, sending)
            return
        page = scope["path"].startswith(_PAGE) and not scope["path"].startswith(f"{_PAGE}upload")
        try:
            if page and scope["method"] == "POST":
                receive = await _event(receive)
        except _Refused as error:
            await _refusal(error.status, str(error))(scope, receive, sending)
            return
        await self._within(scope, receive, sending)

    def _refused(self, scope: Scope, headers: Headers) -> Response | None:
        path, writes = scope["path"], scope["method"] not in ("GET", "HEAD", "OPTIONS")
        name = urlsplit(f"//{headers.get('host', '')}").hostname or ""
        if self.local and name not in LOCAL:  # another site's name that leads here
            return _refusal(403, f"this app answers to {self.host} only")
        origin = headers.get("origin")
        if writes and origin is not None and urlsplit(origin).netloc != headers.get("host", ""):
            return _refusal(403, "this request comes from another site")
        if path.startswith((f"{_PAGE}proxy=", f"{_PAGE}file=http:", f"{_PAGE}file=https:")):
            return _refusal(403, "nothing is fetched from elsewhere")
        if writes and path.startswith((_OURS, f"{_PAGE}upload")) and not self.opens(headers):
            return _refusal(401, self.remedy())
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self.most:
            return _refusal(413, _BEYOND)
        return None

    def remedy(self) -> str:
        """What to do where it is not open."""
        if self.closed:
            return "uploads and lessons are closed: start the app with --token, for it listens to other machines"
        return "a token is needed: open /?token=..., or send the header 'Authorization: Bearer ...'"

    async def _within(self, scope: Scope, receive: Receive, send: Send) -> None:
        """What is behind the gate reads at most so much, whatever the headers said."""
        read, begun = 0, False

        async def counting() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self.most:
                raise _Refused(413, _BEYOND)
            return message

        async def noticing(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self.app(scope, counting, noticing)
        except _Refused as error:
            if not begun:
                await _refusal(error.status, str(error))(scope, receive, send)


class _Refused(Exception):
    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


async def _event(receive: Receive) -> Receive:
    """What a page sends beside files, read whole and looked through: a file in it is never an address."""
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            return receive
        body, more = body + message.get("body", b""), message.get("more_body", False)
        if len(body) > _LONGEST_EVENT:
            raise _Refused(413, _BEYOND)
    try:
        elsewhere = _leads_elsewhere(json.loads(body or b"null"))
    except (ValueError, RecursionError):
        elsewhere = False  # no JSON, which what is behind refuses
    if elsewhere:
        raise _Refused(403, "files come by upload, not from an address")
    sent = False

    async def again() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _leads_elsewhere(value: Any) -> bool:
    if isinstance(value, dict):
        path = value.get("path")
        return (isinstance(path, str) and "://" in path) or any(map(_leads_elsewhere, value.values()))
    return isinstance(value, list) and any(map(_leads_elsewhere, value))


def _pass(token: str) -> str:
    """What a browser keeps: it opens this app, and does not tell the token."""
    return sha256(f"perdure app {token}".encode()).hexdigest()


def _refusal(status: int, why: str) -> Response:
    return JSONResponse({"error": why}, status)
