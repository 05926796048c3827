"""Errors of the API as problem details (RFC 9457), each with the request's id."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

import msgspec
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from cloud.errors import StoreError, TransportError

MEDIA_TYPE = "application/problem+json"


class Problem(HTTPException):
    """Answer with `status` and say why; `reason` is a stable code."""

    def __init__(self, status: int, reason: str, detail: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(status, detail, headers)
        self.reason = reason


def problem_response(
    status: int,
    reason: str,
    detail: str,
    *,
    instance: str = "",
    headers: dict[str, str] | None = None,
    **more: Any,
) -> Response:
    """The problem as JSON."""
    body = {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "reason": reason,
        "detail": detail,
        "instance": instance,
    }
    return Response(msgspec.json.encode(body | more), status, headers, MEDIA_TYPE)


def answer_with_problems(app: FastAPI) -> None:
    """Make every error of `app` a problem."""

    @app.exception_handler(HTTPException)
    async def refuse(request: Request, error: HTTPException) -> Response:
        reason = error.reason if isinstance(error, Problem) else HTTPStatus(error.status_code).name.lower()
        headers = dict(error.headers) if error.headers else None
        return problem_response(
            error.status_code, reason, str(error.detail), instance=request.url.path, headers=headers
        )

    @app.exception_handler(RequestValidationError)
    async def refuse_value(request: Request, error: RequestValidationError) -> Response:
        faults = [{"at": ".".join(map(str, one["loc"])), "what": one["msg"]} for one in error.errors()]
        detail = "; ".join(f"{one['at']}: {one['what']}" for one in faults)
        return problem_response(422, "invalid", detail, instance=request.url.path, faults=faults)

    async def wait(request: Request, error: Exception) -> Response:
        reason = "store" if isinstance(error, StoreError) else "broker"
        return problem_response(
            503, reason, str(error), instance=request.url.path, headers={"Retry-After": "5"}
        )

    app.add_exception_handler(StoreError, wait)
    app.add_exception_handler(TransportError, wait)
