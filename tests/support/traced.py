"""All roles in one process, to collect their spans: `python -m tests.support.traced ACCOUNT`.

It prints the spans of one payment as JSON.
"""

import asyncio
import json
import sys
import threading

import uvicorn
from celery import Celery
from celery.contrib.testing.worker import start_worker
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from config.celery_config import QUEUES
from config.settings import settings
from tasks import tracing
from tasks.app import app
from tests.support.simulator import eventually

TRACE, SENDER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
callback_received = threading.Event()


@app.task(name="ledger.execute_ach")
def execute_ach(_outcome: object) -> None:
    """Run the payments service's callback."""
    callback_received.set()


def main(account_id: str) -> None:
    """Run one payment and print its spans."""
    spans = InMemorySpanExporter()
    tracing.enable(SimpleSpanProcessor(spans))
    web = uvicorn.Server(
        uvicorn.Config("webhook.endpoint:app", port=settings().webhook_port, lifespan="off", log_level="error")
    )
    serving = threading.Thread(target=lambda: asyncio.run(web.serve()), daemon=True)
    serving.start()
    sender = Celery("sender", broker=settings().effective_broker_url, set_as_current=False)
    with start_worker(app, pool="threads", concurrency=4, perform_ping_check=False, queues=[*QUEUES, "svc"]):
        sender.send_task(
            "payments.initiate",
            kwargs={"payment_id": "pay_1", "account_id": account_id, "amount": "25.00"},
            queue="payments",
            headers={tracing.TRACE_HEADER: f"00-{TRACE}-{SENDER}-01"},
            link=app.signature("ledger.execute_ach", queue="svc"),
            ignore_result=True,
        )
        assert callback_received.wait(20)
        eventually(lambda: any(span.name == "ledger.execute_ach" for span in spans.get_finished_spans()))
        eventually(lambda: any(span.name == "outcomes.deliver" for span in spans.get_finished_spans()))
    web.should_exit = True
    serving.join(5)
    lines = [
        {
            "name": span.name,
            "trace": f"{span.context.trace_id:032x}",
            "id": f"{span.context.span_id:016x}",
            "parent": f"{span.parent.span_id:016x}" if span.parent else None,
            "links": [f"{link.context.span_id:016x}" for link in span.links],
            "lasted_s": ((span.end_time or 0) - (span.start_time or 0)) / 1e9,
        }
        for span in spans.get_finished_spans()
    ]
    sys.stdout.write(json.dumps(lines))


if __name__ == "__main__":
    main(sys.argv[1])
