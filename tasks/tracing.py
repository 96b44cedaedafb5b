"""One trace per payment: from the message of the payments service, over the wait, to its callback.

Celery's messages carry the trace in the header `traceparent` (W3C Trace Context). The wait is a span of its own: a
child of the suspended task's span that starts at the suspension and links to the span that resolves the payment.
Messages that are sent on resumption are children of this span. Maintenance tasks (`UNTRACED_TASKS`) have no spans: most
runs find nothing to do.

`requirements-otel.txt` has OpenTelemetry. Only this module imports it, and only with `PAYREADY_TRACING_ENABLED`.
"""

from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

from celery.signals import before_task_publish, task_postrun, task_prerun

from config.settings import ConfigurationError

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import SpanProcessor

TRACE_HEADER = "traceparent"
UNTRACED_TASKS = frozenset({"payments.expire", "payments.sweep", "webhooks.check_subscription", "quarantine.prune"})
NANOSECONDS = 1_000_000_000


class _Tracing:
    """Spans for sent messages, tasks and waits."""

    def __init__(self, processor: "SpanProcessor") -> None:
        from opentelemetry import context, trace  # noqa: PLC0415 - an extra
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator  # noqa: PLC0415

        self._context, self._trace, self._propagator = context, trace, TraceContextTextMapPropagator()
        provider = TracerProvider()
        provider.add_span_processor(processor)
        self._tracer = provider.get_tracer("payready")
        self._running: dict[str, tuple[Any, Any]] = {}

    def trace_context(self) -> dict[str, str]:
        """Return the current span as message headers."""
        headers: dict[str, str] = {}
        self._propagator.inject(headers)
        return headers

    def _parent(self, trace: Mapping[str, Any]) -> "Context | None":
        traceparent = trace.get(TRACE_HEADER)
        return self._propagator.extract({TRACE_HEADER: traceparent}) if isinstance(traceparent, str) else None

    def on_publish(self, sender: str, headers: MutableMapping[str, Any]) -> None:
        """Add the current trace to the headers of a message that is about to be sent."""
        if sender not in UNTRACED_TASKS:
            has_current_span = self._trace.get_current_span().get_span_context().is_valid
            parent = None if has_current_span else self._parent(headers)
            span = self._tracer.start_span(f"send {sender}", context=parent, kind=self._trace.SpanKind.PRODUCER)
            with self._trace.use_span(span, end_on_exit=True):
                headers.update(self.trace_context())

    def on_start(self, task_id: str, task: Any) -> None:
        """Start the span of a task."""
        if task.name not in UNTRACED_TASKS:
            span = self._tracer.start_span(
                task.name, context=self._parent(task.request), kind=self._trace.SpanKind.CONSUMER
            )
            self._running[task_id] = span, self._context.attach(self._trace.set_span_in_context(span))

    def on_end(self, task_id: str) -> None:
        """End the span of a task that finished or was suspended."""
        span, token = self._running.pop(task_id, (None, None))
        if span is not None:
            self._context.detach(token)
            span.end()

    @contextmanager
    def resumed_span(self, trace: Mapping[str, Any], since_unix_s: float, name: str) -> Iterator[None]:
        """Create the span of a wait that ends now, and run the block in it."""
        resolved_by = self._trace.get_current_span().get_span_context()
        links = [self._trace.Link(resolved_by)] if resolved_by.is_valid else []
        span = self._tracer.start_span(
            name, context=self._parent(trace), start_time=round(since_unix_s * NANOSECONDS), links=links
        )
        with self._trace.use_span(span, end_on_exit=True):
            yield


_tracing: _Tracing | None = None


def enable(processor: "SpanProcessor | None" = None) -> None:
    """Enable tracing in this process. By default OpenTelemetry's own environment variables set the destination.

    Raises:
        ConfigurationError: OpenTelemetry is not installed.
    """
    global _tracing  # noqa: PLW0603 - one tracer per process
    try:
        _tracing = _Tracing(processor or _default_processor())
    except ImportError:
        raise ConfigurationError(
            "PAYREADY_TRACING_ENABLED requires OpenTelemetry; install requirements-otel.txt"
        ) from None
    before_task_publish.connect(_record_send_span_and_add_trace_headers)
    task_prerun.connect(_on_start)
    task_postrun.connect(_on_end)


def _default_processor() -> "SpanProcessor":
    exporter = import_module("opentelemetry.exporter.otlp.proto.http.trace_exporter").OTLPSpanExporter()
    processor: SpanProcessor = import_module("opentelemetry.sdk.trace.export").BatchSpanProcessor(exporter)
    return processor


def _record_send_span_and_add_trace_headers(sender: str, headers: MutableMapping[str, Any], **_: Any) -> None:
    if _tracing:
        _tracing.on_publish(sender, headers)


def _on_start(task_id: str, task: Any, **_: Any) -> None:
    if _tracing:
        _tracing.on_start(task_id, task)


def _on_end(task_id: str, **_: Any) -> None:
    if _tracing:
        _tracing.on_end(task_id)


def is_enabled() -> bool:
    """Return whether this process traces."""
    return _tracing is not None


def trace_context() -> dict[str, str]:
    """Return the current trace for a continuation, or an empty mapping if tracing is disabled."""
    return _tracing.trace_context() if _tracing else {}


@contextmanager
def resumed_span(trace: Mapping[str, Any], since_unix_s: float, name: str) -> Iterator[None]:
    """Run the block in the span of a wait that belongs to `trace` and started at `since` (Unix seconds)."""
    if _tracing is None:
        yield
        return
    with _tracing.resumed_span(trace, since_unix_s, name):
        yield
