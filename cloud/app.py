"""The service put together: the store, the engine, the pipeline, and the API over them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from fastapi import FastAPI
from fastapi.staticfiles import StaticFiles
from starlette.datastructures import MutableHeaders
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cloud.config import CloudConfig
from cloud.engine import Engine, LocalEngine
from cloud.feed import Feed
from cloud.metrics import Metrics
from cloud.pipeline import Pipeline
from cloud.routes import DASHBOARD, Service, router
from cloud.store import Store
from cloud.transport import Transport, open_transport

SECURITY_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
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
        The store's URL, the TLS files or a model cannot be used.
    """
    metrics = Metrics()
    store = Store(config.store, metrics.cpu)
    if engine is None:
        engine = LocalEngine(config.models, config.batch.max_size, config.engine, metrics.cpu)
    if transport is None:
        transport = open_transport(config.broker)
    feed = Feed(metrics.events_dropped)
    pipeline = Pipeline(config, transport=transport, engine=engine, store=store, metrics=metrics, feed=feed)
    service = Service(transport, engine, store, metrics, feed, pipeline)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            await store.open()
            stack.push_async_callback(store.close)
            stack.push_async_callback(engine.stop)
            await engine.start()
            await pipeline.start()
            stack.push_async_callback(pipeline.drain)
            yield

    # FastAPI's own pages of documentation load scripts from elsewhere.
    app = FastAPI(title="Splitward cloud", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    app.include_router(router)
    app.mount("/dashboard", StaticFiles(directory=DASHBOARD))
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=OWN_NAMES)
    app.add_middleware(_SecureHeaders)
    return app


class _SecureHeaders:
    """Adds `SECURITY_HEADERS` to every answer, streams included."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(SECURITY_HEADERS)
            await send(message)

        await self._app(scope, receive, send_with_headers)
