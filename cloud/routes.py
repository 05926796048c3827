"""What is asked for outside `/v1`: health, metrics, the dashboard; and the parts that all routes look into."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import msgspec
from fastapi import APIRouter, Depends, Request
from fastapi.responses import FileResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from cloud.access import Access, Reader
from cloud.authority import Authority
from cloud.config import FleetConfig
from cloud.engine import Engine
from cloud.enrolment import Enrolment
from cloud.errors import StoreError
from cloud.feed import Feed
from cloud.metrics import Metrics
from cloud.orders import Orders
from cloud.pipeline import Pipeline
from cloud.registry import Registry
from cloud.rollout import Rollouts
from cloud.store import Store
from cloud.training import Trainings
from cloud.transport import Transport

DASHBOARD = Path(__file__).with_name("dashboard")

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
    access: Access
    authority: Authority
    enrolment: Enrolment
    registry: Registry
    orders: Orders
    rollouts: Rollouts
    trainings: Trainings
    fleet: FleetConfig


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


Parts = Annotated[Service, Depends(_service)]


@router.get("/", include_in_schema=False)
async def dashboard() -> FileResponse:
    """The dashboard's page."""
    return FileResponse(DASHBOARD / "index.html")


@router.get("/healthz")
async def health() -> Response:
    """200 while the process can answer."""
    return as_json({"status": "alive"})


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
    return as_json({"ready": not reasons, "reasons": reasons}, 503 if reasons else 200)


@router.get("/metrics")
async def metrics(parts: Parts, _caller: Reader) -> Response:
    """Everything counted and measured, in Prometheus's text format."""
    return Response(parts.metrics.expose(), media_type=CONTENT_TYPE_LATEST)


@router.get("/openapi.json", include_in_schema=False)
async def description(request: Request, _caller: Reader) -> Response:
    """The API's description."""
    return as_json(request.app.openapi())


def as_json(value: Any, status: int = 200, media_type: str = "application/json") -> Response:
    """`value` as JSON."""
    return Response(msgspec.json.encode(value), status, media_type=media_type)
