"""The service put together: the store, the engine, the pipeline, and the API over them."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path

import msgspec
from cryptography import x509
from fastapi import FastAPI
from fastapi.staticfiles import StaticFiles
from starlette.middleware.trustedhost import TrustedHostMiddleware

from cloud import api
from cloud.access import Access
from cloud.authority import Authority
from cloud.config import CloudConfig
from cloud.engine import Engine, LocalEngine
from cloud.enrolment import Enrolment
from cloud.feed import Feed
from cloud.guard import Guard
from cloud.metrics import CpuClock, Metrics
from cloud.orders import Orders
from cloud.pipeline import Pipeline
from cloud.problem import answer_with_problems
from cloud.registry import Registry
from cloud.retention import keep_retention
from cloud.rollout import Rollouts
from cloud.routes import DASHBOARD, Service, router
from cloud.store import Store
from cloud.tracing import Tracing
from cloud.training import Trainings
from cloud.transport import Transport, open_transport
from splitward.wire.bundle import read_trusted_key

OWN_NAMES = ["127.0.0.1", "localhost", "[::1]"]
"""Any other Host header comes from a page that points its own name at this machine (DNS rebinding)."""


def create_app(
    config: CloudConfig, *, transport: Transport | None = None, engine: Engine | None = None
) -> FastAPI:
    """The service as an ASGI application; its lifespan starts and drains everything.

    Parameters
    ----------
    transport, engine : optional
        Other than the configured ones.

    Raises
    ------
    ConfigError, BundleError
        The store's URL, the TLS files, the engine's device or a model cannot be used.
    """
    tracing = Tracing(config.trace, config.broker.client_id)
    service = _assemble(config, tracing, transport, engine)
    _tell_expiries(config, service.metrics)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            stack.push_async_callback(asyncio.to_thread, tracing.close)
            await _start(service, config, stack)
            yield

    # FastAPI's own pages of documentation load scripts from elsewhere, and its description asks for no token.
    app = FastAPI(title="Splitward cloud", version="1", lifespan=lifespan, openapi_url=None)
    app.state.service = service
    app.include_router(router)
    app.include_router(api.router)
    app.mount("/dashboard", StaticFiles(directory=DASHBOARD))
    answer_with_problems(app)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*OWN_NAMES, *config.api.names])
    app.add_middleware(
        Guard, max_body_bytes=config.api.max_body_bytes, requests=service.metrics.requests, tracing=tracing
    )
    return app


def _assemble(
    config: CloudConfig, tracing: Tracing, transport: Transport | None, engine: Engine | None
) -> Service:
    """Every part, each with the parts that it calls; none is started."""
    fleet, state = config.fleet, Path(config.fleet.state_dir)
    metrics = Metrics()
    store = Store(config.store, metrics.cpu)
    engine = engine or open_engine(config, metrics.cpu)
    feed = Feed(metrics.events_dropped)
    authority = Authority(state)
    hidden = authority.client_id(config.broker.client_id)
    transport = transport or open_transport(msgspec.structs.replace(config.broker, client_id=hidden))
    trusted = read_trusted_key(Path(fleet.trusted_key)) if fleet.trusted_key else None
    registry = Registry(store, state / "bundles", trusted)
    address = f"{'https' if config.api.cert else 'http'}://{config.api.host}:{config.api.port}"
    orders = Orders(store, transport, authority, fleet, address, metrics)
    return Service(
        transport=transport,
        engine=engine,
        store=store,
        metrics=metrics,
        feed=feed,
        pipeline=Pipeline(
            config,
            transport=transport,
            engine=engine,
            store=store,
            metrics=metrics,
            feed=feed,
            tracing=tracing,
            on_outcome=orders.note_outcome,
        ),
        access=Access(store, config.api),
        authority=authority,
        enrolment=Enrolment(store, authority, fleet),
        registry=registry,
        orders=orders,
        rollouts=Rollouts(store, orders, registry, metrics),
        trainings=Trainings(store, config.broker, state / "trainings", metrics),
        fleet=fleet,
    )


async def _start(service: Service, config: CloudConfig, stack: AsyncExitStack) -> None:
    """Start every part; `stack` ends them in the opposite order, each after those that call it."""
    await service.store.open()
    stack.push_async_callback(service.store.close)
    stack.push_async_callback(service.engine.stop)
    await service.engine.start()
    await service.pipeline.start()
    stack.push_async_callback(service.pipeline.drain)
    stack.push_async_callback(service.orders.write_outcomes)
    retention = keep_retention(service.store, config.store, service.metrics)
    for work in (service.rollouts.keep(), service.trainings.keep(), retention):
        stack.push_async_callback(_end, asyncio.create_task(work))


def _tell_expiries(config: CloudConfig, metrics: Metrics) -> None:
    """When the certificates end: the API's as it was at the start, the broker's as it would be shown now."""
    expires = metrics.certificate_expires
    if config.api.cert is not None:
        expires.labels("api").set(_expires_at_s(config.api.cert))
    if config.broker.tls is not None and config.broker.tls.cert is not None:
        expires.labels("broker").set_function(partial(_expires_at_s, config.broker.tls.cert))


def _expires_at_s(path: str) -> float:
    """When the PEM certificate ends, in seconds since 1970; not a number where it cannot be read."""
    try:
        return x509.load_pem_x509_certificate(Path(path).read_bytes()).not_valid_after_utc.timestamp()
    except (OSError, ValueError):
        return math.nan


def open_engine(config: CloudConfig, clock: CpuClock) -> Engine:
    """The configured engine, not yet started."""
    if config.engine.kind == "local":
        return LocalEngine(config.models, config.batch.max_size, config.engine, clock)
    from cloud.ray_engine import RayEngine  # Ray is an extra

    return RayEngine(config.models, config.batch.max_size, config.engine)


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
