"""OpenTelemetry traces, by option: a span for each micro-batch and its steps, and for each request of the API.

A span tells model, counts, route and outcome: no device, no query, no value of a frame.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from cloud.config import TraceConfig
from splitward.errors import ConfigError
from splitward.versions import versions

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Tracer


class Tracing:
    """Makes spans and sends them, in a thread of its own, to the collector of `config`; without one, nothing.

    Parameters
    ----------
    config : TraceConfig
    worker : str
        Name of this worker in the traces.

    Raises
    ------
    ConfigError
        An endpoint is given and OpenTelemetry is not installed.
    """

    def __init__(self, config: TraceConfig, worker: str) -> None:
        self._provider: TracerProvider | None = None
        self._tracer: Tracer | None = None
        if not config.endpoint:
            return
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
        except ImportError as error:
            raise ConfigError(f"trace.endpoint needs {error.name}: pip install 'splitward[trace]'.") from error
        about = {"service.name": "splitward-cloud", "service.instance.id": worker}
        about["service.version"] = versions()["splitward"]
        sampler = ParentBased(TraceIdRatioBased(config.share))
        self._provider = TracerProvider(sampler, Resource.create(about))
        exporter = OTLPSpanExporter(config.endpoint, timeout=config.timeout_s)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("cloud")

    def span(self, name: str, **attributes: str | int) -> AbstractContextManager[Any]:
        """The time within, as a part of the span around it; gives the span, or None when nothing is traced."""
        if self._tracer is None:
            return nullcontext()
        return self._tracer.start_as_current_span(name, attributes=attributes)

    def close(self) -> None:
        """Send what is left."""
        if self._provider is not None:
            self._provider.shutdown()
