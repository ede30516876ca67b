"""Who may ask, and how much: checks before any route, limits on bodies, and headers on every answer.

Host      an address or name of this server and its port          else 400, so that no foreign name can be rebound to it
Origin    none or this server; Sec-Fetch-Site and Referer too      else 403
token     Authorization: Bearer, where one is set                  else 401
body      JSON alone, at most so many bytes, within ten seconds    else 415, 413, 408
"""

import asyncio
import hmac
import ipaddress
import re
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from ppf.server.wire import Refusal, load, refused

BODY_SECONDS = 10.0
HEADER_BYTES = 16 * 1024
_SAFE = ("GET", "HEAD")
_HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]{2,45})\]|([A-Za-z0-9.-]{1,253}))(?::([0-9]{1,5}))?")
_PORTS = {"http": 80, "https": 443}
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; "
    "object-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_RAW_HEADERS = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


@dataclass(frozen=True)
class Access:
    """Under which names the server is asked, and what a request may be.

    Attributes:
        hosts: Names and addresses in their shortest form, in lower case.
        port: That it listens at.
        any_address: Whether any IP address will do, as where it listens at all of them; a rebound name is never one.
        token: What clients must send; None asks for none.
        max_body: Bytes of a body.
    """

    hosts: frozenset[str]
    port: int
    any_address: bool = False
    token: str | None = None
    max_body: int = 64 * 1024

    def knows(self, host: str) -> bool:
        """Whether a Host header, or an origin without its scheme, is this server's."""
        return self._is_ours(host, "http")

    def is_own_origin(self, origin: str) -> bool:
        """Whether an Origin or Referer header is this server's."""
        scheme, mark, rest = origin.partition("://")
        return bool(mark) and scheme in _PORTS and self._is_ours(rest.partition("/")[0], scheme)

    def _is_ours(self, host: str, scheme: str) -> bool:
        found = _HOST.fullmatch(host)
        if not found or int(found[3] or _PORTS[scheme]) != self.port:
            return False
        try:
            address = ipaddress.ip_address(found[1] or found[2])
        except ValueError:
            return found[1] is None and found[2].lower() in self.hosts
        return str(address) in self.hosts or (self.any_address and not address.is_unspecified)


class Guard:
    """ASGI middleware around the whole application.

    Args:
        app: What it guards.
        access: Who may ask, and how much.

    Attributes:
        counts: Answers by status.
    """

    def __init__(self, app: Callable[[Message, Receive, Send], Awaitable[None]], access: Access) -> None:
        self.app, self.access = app, access
        self.counts: Counter[int] = Counter()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        sender = self._with_headers(send)
        try:
            self._check(scope)
            if scope["method"] not in _SAFE:
                body = await self._body(scope, receive)
                if body is None:  # the client has gone
                    return
                receive = _replayed(body, receive)
        except Refusal as refusal:
            headers = {"Connection": "close"} | ({"WWW-Authenticate": "Bearer"} if refusal.status == 401 else {})
            return await refused(refusal.status, refusal.message, refusal.code, headers)(scope, receive, sender)
        await self.app(scope, receive, sender)

    async def turn_away(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answers on a connection that is one too many, in place of the application."""
        message = "the server must have a connection left; all are taken; try again later"
        await refused(503, message, "busy", {"Connection": "close"})(scope, receive, self._with_headers(send))

    def _check(self, scope: Message) -> None:
        access, path = self.access, scope["path"]
        hosts = _values(scope, b"host")
        if len(hosts) != 1 or not access.knows(hosts[0]) or not path.startswith("/"):
            raise Refusal(
                400, "a request must name this server as its host; it names another; use the address shown at start", "bad_host"
            )
        if not self._is_same_site(scope):
            raise Refusal(
                403,
                "a request must come from the server's own page or from none; another sent it; open the address shown at start",
                "bad_origin",
            )
        if access.token is not None and not is_public(path) and not _is_bearer(_values(scope, b"authorization"), access.token):
            raise Refusal(
                401, "a request must carry the server's token; it does not; send Authorization: Bearer TOKEN", "bad_token"
            )
        if sum(len(name) + len(value) for name, value in scope["headers"]) > HEADER_BYTES:
            raise Refusal(431, f"headers must be at most {HEADER_BYTES} bytes; more came; send fewer", "too_long")
        if len(scope["query_string"]) > 4096:
            raise Refusal(414, "a query must be at most 4096 bytes; a longer one came; shorten it", "too_long")

    def _is_same_site(self, scope: Message) -> bool:
        origins, referers = _values(scope, b"origin"), _values(scope, b"referer")
        if any(not self.access.is_own_origin(origin) for origin in origins):
            return False
        if scope["method"] in _SAFE and is_public(scope["path"]):  # a link or a bookmark may lead to the page
            return True
        if any(site not in ("same-origin", "none") for site in _values(scope, b"sec-fetch-site")):
            return False
        return bool(origins) or all(self.access.is_own_origin(referer) for referer in referers)

    async def _body(self, scope: Message, receive: Receive) -> bytes | None:
        """The whole body, checked; None if the client left."""
        lengths = _values(scope, b"content-length")
        if any(not length.isdecimal() or int(length[:20]) > self.access.max_body for length in lengths):
            raise self._too_large()
        chunks, size = [], 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    chunks.append(message.get("body", b""))
                    size += len(chunks[-1])
                    if size > self.access.max_body:
                        raise self._too_large()
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            raise Refusal(408, f"a body must come within {BODY_SECONDS:g} s; it did not; send it faster", "too_slow") from None
        if size:
            kinds = _values(scope, b"content-type")
            if len(kinds) != 1 or kinds[0].partition(";")[0].strip().lower() != "application/json":
                raise Refusal(
                    415, "a body must be application/json; another type came; say Content-Type: application/json", "bad_type"
                )
            if any(coding.lower() != "identity" for coding in _values(scope, b"content-encoding")):
                raise Refusal(415, "a body must come as it is; a packed one came; leave Content-Encoding out", "bad_type")
            load(b"".join(chunks))
        return b"".join(chunks)

    def _with_headers(self, send: Send) -> Send:
        async def sender(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.counts[message["status"]] += 1
                present = {name.lower() for name, _ in message.get("headers", ())}
                message["headers"] = [*message.get("headers", ()), *(pair for pair in _RAW_HEADERS if pair[0] not in present)]
            await send(message)

        return sender

    def _too_large(self) -> Refusal:
        return Refusal(413, f"a body must be at most {self.access.max_body} bytes; a larger one came; shorten it", "too_large")


def is_public(path: str) -> bool:
    """Whether a path is part of the page itself, which holds no data."""
    return path == "/" or path.startswith("/static/")


def _values(scope: Message, name: bytes) -> list[str]:
    return [value.decode("latin-1").strip() for key, value in scope["headers"] if key.lower() == name]


def _is_bearer(values: list[str], token: str) -> bool:
    if len(values) != 1:
        return False
    scheme, _, given = values[0].partition(" ")
    return hmac.compare_digest(given.strip().encode("latin-1"), token.encode()) and scheme.lower() == "bearer"


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A body that was read already, then whatever comes."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
