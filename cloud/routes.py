"""The HTTP interface: health, metrics, devices, results, live events, and the dashboard."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Depends, HTTPException, Query, Request
from fastapi.responses import FileResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST

from cloud.engine import Engine
from cloud.errors import StoreError
from cloud.feed import Feed
from cloud.metrics import Metrics
from cloud.pipeline import Pipeline
from cloud.store import Store
from cloud.transport import Transport

DASHBOARD = Path(__file__).with_name("dashboard")
MAX_LIMIT = 1000

router = APIRouter()


@dataclass(frozen=True, slots=True)
class Service:
    """The parts that the routes look into."""

    transport: Transport
    engine: Engine
    store: Store
    metrics: Metrics
    feed: Feed
    pipeline: Pipeline


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


Parts = Annotated[Service, Depends(_service)]
Limit = Annotated[int, Query(ge=1, le=MAX_LIMIT)]


@router.get("/", include_in_schema=False)
async def dashboard() -> FileResponse:
    """The dashboard's page."""
    return FileResponse(DASHBOARD / "index.html")


@router.get("/healthz")
async def health() -> Response:
    """200 while the process can answer."""
    return _json({"status": "alive"})


@router.get("/readyz")
async def ready(parts: Parts) -> Response:
    """200 when activations can be answered now, else 503 and the reasons."""
    reasons = []
    if not parts.transport.connected:
        reasons.append("the broker is not connected")
    if not parts.engine.cards:
        reasons.append("no model is loaded")
    if parts.pipeline.failing is not None:
        reasons.append(parts.pipeline.failing)
    try:
        await parts.store.check()
    except StoreError as error:
        reasons.append(str(error))
    return _json({"ready": not reasons, "reasons": reasons}, 503 if reasons else 200)


@router.get("/metrics")
async def metrics(parts: Parts) -> Response:
    """Everything counted and measured, in Prometheus's text format."""
    return Response(parts.metrics.expose(), media_type=CONTENT_TYPE_LATEST)


@router.get("/models")
async def models(parts: Parts) -> Response:
    """The models that are served, and the names of their classes."""
    cards = parts.engine.cards.values()
    return _json({"models": [{"model": c.model, "name": c.name, "classes": c.classes} for c in cards]})


@router.get("/devices")
async def devices(parts: Parts, after: str = "", limit: Limit = 100) -> Response:
    """Devices by site and name; go on after `next`, which is `SITE/DEVICE`."""
    site, _, device = after.partition("/")
    found = await _ask(parts.store.devices(after=(site, device), limit=limit))
    return _json({"devices": found, "next": f"{found[-1].site}/{found[-1].device}" if found else after})


@router.get("/results")
async def results(
    parts: Parts,
    device: str | None = None,
    model: str | None = None,
    after: str | None = None,
    limit: Limit = 100,
) -> Response:
    """Results in the order of storing: the last `limit`, or the first `limit` after `after`.

    `after` is the `next` of an earlier answer, or a time in nanoseconds of UTC since 1970.
    """
    try:
        found = await _ask(parts.store.results(device=device, model=model, after=after, limit=limit))
    except ValueError as error:
        raise HTTPException(422, f"after: {error}") from error
    return _json({"results": found, "next": found[-1].cursor if found else after})


@router.get("/events")
async def events(parts: Parts) -> StreamingResponse:
    """New results as server-sent events: `result`, and `missed` with a count when the reader was slow."""
    if parts.feed.full:
        raise HTTPException(503, "as many readers as there may be; close one, or poll /results")
    return StreamingResponse(parts.feed.stream(), media_type="text/event-stream")


async def _ask(answer: Any) -> Any:
    """`answer` of the store, or 503 while the store fails."""
    try:
        return await answer
    except StoreError as error:
        raise HTTPException(503, str(error)) from error


def _json(value: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")
