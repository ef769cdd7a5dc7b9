"""What a request must keep to before anything reads it: the size of its body, its key, and that its body is JSON."""

from __future__ import annotations

import hmac
import json
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adi.serve.errors import ApiError

OPEN_PATHS = ("/", "/health", "/ready", "/metrics")  # hold no text, and are read by browsers and machines without a key


def as_json(value: object) -> bytes:
    """JSON in ASCII, which spells also what no UTF-8 can."""
    return json.dumps(value).encode()


async def answer(send: Send, error: ApiError) -> None:
    """Send an error as the whole response."""
    headers = {"content-type": "application/json", **(error.headers or {})}
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status_code, "headers": raw})
    await send({"type": "http.response.body", "body": as_json(error.body())})


class Limits:
    """Refuses a request whose body is over ``most_bytes`` (413), is not declared as JSON (415), which no page of another
    origin may then send unasked, or that lacks one of ``keys`` where there are some (401)."""

    def __init__(self, app: ASGIApp, most_bytes: int, keys: Sequence[str]) -> None:
        self.app, self.most_bytes, self.keys = app, most_bytes, tuple(key.encode() for key in keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        taken = 0

        async def counted() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self.most_bytes:
                raise self._too_large(f"more than {self.most_bytes}")
            return message

        try:
            self._check(scope, Headers(scope=scope))
        except ApiError as error:
            await answer(send, error)
        else:
            await self.app(scope, counted, send)

    def _check(self, scope: Scope, headers: Headers) -> None:
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self.most_bytes:
            raise self._too_large(length)
        if self.keys and scope["path"] not in OPEN_PATHS and scope["method"] != "OPTIONS":
            scheme, _, given = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not any(hmac.compare_digest(given.encode(), key) for key in self.keys):
                said = "an API key is needed: Authorization: Bearer KEY." if not given else "the API key is not known here."
                wanted = {"WWW-Authenticate": "Bearer"}
                raise ApiError(401, said, "authentication_error", code="invalid_api_key", headers=wanted)
        kind = headers.get("content-type", "of no type").partition(";")[0].strip().lower()
        if scope["method"] == "POST" and kind != "application/json":
            said = f"the body is {kind!r:.60}; send application/json."
            raise ApiError(415, said, code="unsupported_media_type")

    def _too_large(self, length: str) -> ApiError:
        return ApiError(413, f"the body has {length:.20} bytes; at most {self.most_bytes} are read.", code="body_too_large")
