"""Webhook deliveries: signed, sent over a few connections, retried with exponential backoff until a 2xx."""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from simulator.http_connection import HttpConnection
from simulator.quiltt_records import BodyIds, ids_in_body
from simulator.request_log import RequestLog
from simulator.scenarios import Defaults
from simulator.signing import sign

MAX_CONNECTIONS = 32
MAX_ATTEMPTS = 20


@dataclass(slots=True, kw_only=True)
class OutgoingDelivery:
    """One body to deliver, and the parameters of its signature."""

    body: bytes
    secret: str | None = None
    """Secret that signs the body. None: the sender's secret."""
    signature_age_s: int = 0
    """Age of the timestamp when it is sent."""
    timestamp: int | None = None
    """Value of `Quiltt-Timestamp`. It overrides `signature_age_s`."""
    extra_delay_s: float = 0.0
    """Delay between the due time of the event and the first attempt."""
    max_attempts: int = MAX_ATTEMPTS
    attempts: int = 0
    """Number of attempts so far."""
    attempted: asyncio.Event = field(default_factory=asyncio.Event)
    """Set after the first attempt."""
    body_ids: BodyIds = field(init=False)

    def __post_init__(self) -> None:
        self.body_ids = ids_in_body(self.body)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptResult:
    """Result of an attempt: a status, or the name of an error."""

    status: int | None = None
    error: str | None = None

    @property
    def delivered(self) -> bool:
        """Whether the response was a 2xx."""
        return self.status is not None and 200 <= self.status < 300


class WebhookSender:
    """Sender of deliveries to the webhook URL. `pending` counts deliveries that have not ended."""

    def __init__(self, url: str, secret: str, log: RequestLog) -> None:
        self.defaults = Defaults()
        self.pending = 0
        self._url = url
        self._secret = secret
        self._log = log
        self._queue: asyncio.Queue[OutgoingDelivery] = asyncio.Queue()
        self._not_paused = asyncio.Event()
        self._not_paused.set()

    def schedule(self, delay_s: float, make_deliveries: Callable[[], Sequence[OutgoingDelivery]]) -> asyncio.Event:
        """Create and send deliveries after the delay.

        The returned event is set after the first attempt, or if there is nothing to send.
        """
        attempted = asyncio.Event()
        self.pending += 1
        asyncio.get_running_loop().call_later(delay_s, self._enqueue_deliveries, make_deliveries, attempted)
        return attempted

    def pause(self) -> None:
        """Pause all deliveries that have not been sent yet."""
        self._not_paused.clear()

    def resume(self) -> None:
        """Send the paused deliveries and continue."""
        self._not_paused.set()

    async def run(self) -> None:
        """Deliver until cancelled."""
        async with asyncio.TaskGroup() as group:
            for _ in range(MAX_CONNECTIONS):
                group.create_task(self._send_queued())

    async def post_now(self, delivery: OutgoingDelivery) -> AttemptResult:
        """Send a delivery now, even while paused, on its own connection and without retries."""
        connection = HttpConnection(self._url)
        try:
            return await self._attempt_delivery(connection, delivery)
        finally:
            connection.close()

    def _enqueue_deliveries(
        self, make_deliveries: Callable[[], Sequence[OutgoingDelivery]], attempted: asyncio.Event
    ) -> None:
        deliveries = make_deliveries()
        self.pending += len(deliveries) - 1
        for delivery in deliveries:
            asyncio.get_running_loop().call_later(delivery.extra_delay_s, self._queue.put_nowait, delivery)
        if deliveries:
            deliveries[0].attempted = attempted
        else:
            attempted.set()

    async def _send_queued(self) -> None:
        connection = HttpConnection(self._url)
        try:
            while True:
                delivery = await self._queue.get()
                await self._not_paused.wait()
                result = await self._attempt_delivery(connection, delivery)
                self._finish_or_retry_up_to_max_attempts(delivery, result)
        finally:
            connection.close()

    def _finish_or_retry_up_to_max_attempts(self, delivery: OutgoingDelivery, result: AttemptResult) -> None:
        """Set `attempted`. Schedule a retry with backoff, unless it was delivered or was the last attempt."""
        delivery.attempted.set()
        if result.delivered or delivery.attempts >= delivery.max_attempts:
            self.pending -= 1
            return
        backoff_s = self.defaults.retry_base_s * 2 ** (delivery.attempts - 1)
        asyncio.get_running_loop().call_later(backoff_s, self._queue.put_nowait, delivery)

    async def _attempt_delivery(self, connection: HttpConnection, delivery: OutgoingDelivery) -> AttemptResult:
        delivery.attempts += 1
        sent_at = time.time()
        timestamp = self._choose_or_reuse_signature_timestamp(delivery, sent_at)
        signature = sign(delivery.secret or self._secret, str(timestamp), delivery.body)
        headers = {"Quiltt-Timestamp": str(timestamp), "Quiltt-Signature": signature}
        try:
            result = AttemptResult(status=await connection.post(delivery.body, headers))
        except (OSError, EOFError, ValueError, asyncio.LimitOverrunError) as error:
            result = AttemptResult(error=type(error).__name__)
        self._log.add_and_write_delivery_attempt(
            ids=delivery.body_ids,
            attempt=delivery.attempts,
            sent_at=sent_at,
            timestamp=timestamp,
            signature_valid=delivery.secret in (None, self._secret),
            status=result.status,
            error=result.error,
        )
        return result

    def _choose_or_reuse_signature_timestamp(self, delivery: OutgoingDelivery, now: float) -> int:
        if delivery.timestamp is not None:
            return delivery.timestamp
        timestamp = int(now) - delivery.signature_age_s
        if self.defaults.keep_signature:
            delivery.timestamp = timestamp  # the same timestamp and body give the same signature
        return timestamp
