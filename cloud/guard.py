"""What every request passes: a size limit, an id, and headers that keep a browser from being misled."""

from __future__ import annotations

import re
import secrets

from prometheus_client import Counter
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cloud.logs import request_id
from cloud.problem import Problem
from cloud.tracing import Tracing

SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
METHODS = frozenset(("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"))
UPLOAD = "/v1/bundles"
"""The only body that may be larger; the registry bounds it."""


class Guard:
    """Wraps the application."""

    def __init__(self, app: ASGIApp, max_body_bytes: int, requests: Counter, tracing: Tracing) -> None:
        self._app = app
        self._tracing = tracing
        self._max_body_bytes = max_body_bytes
        self._requests = requests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        identifier = given if REQUEST_ID.fullmatch(given) else secrets.token_hex(16)
        # anybody may send any word as a method, and Prometheus keeps a counter for each
        method = scope["method"] if scope["method"] in METHODS else "other"
        status = taken = 0

        async def send_guarded(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update(SECURITY_HEADERS | {"X-Request-ID": identifier})
                self._requests.labels(method, status).inc()
            await send(message)

        async def receive_bounded() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self._max_body_bytes and scope["path"] != UPLOAD:
                raise Problem(413, "oversize", f"a body has at most {self._max_body_bytes} bytes.")
            return message

        token = request_id.set(identifier)
        try:
            with self._tracing.span("request", method=method, request_id=identifier) as span:
                await self._app(scope, receive_bounded, send_guarded)
                if span is not None:  # the route is a pattern: no device, no query
                    span.set_attributes({"route": getattr(scope.get("route"), "path", ""), "status": status})
        finally:
            request_id.reset(token)
