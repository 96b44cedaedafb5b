"""Webhook deliveries: signed, queued over a few connections, retried with exponential backoff until a 2xx."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from simulator.http_connection import HttpConnection
from simulator.quiltt_records import BodyIds, ids_in
from simulator.request_log import Log
from simulator.scenarios import Defaults
from simulator.signing import sign

MAX_CONNECTIONS = 32
MAX_TRIES = 20


@dataclass(slots=True)
class OutgoingDelivery:
    """One body to deliver, and how it is signed.

    `secret` None: the right one. `age_s`: how old the timestamp is when sent. `timestamp` (Unix seconds) overrides it.
    """

    body: bytes
    secret: str | None = None
    age_s: int = 0
    timestamp: int | None = None
    delay_s: float = 0.0  # between the due time of the event and the first try
    max_tries: int = MAX_TRIES
    attempts: int = 0
    on_attempt: asyncio.Event = field(default_factory=asyncio.Event)
    ids: BodyIds = field(init=False)

    def __post_init__(self) -> None:
        self.ids = ids_in(self.body)


@dataclass(frozen=True, slots=True)
class DeliveryResult:
    """What an attempt got: a status, or the name of the error that came instead."""

    status: int | None = None
    error: str | None = None

    @property
    def delivered(self) -> bool:
        return self.status is not None and 200 <= self.status < 300


class WebhookSender:
    """Delivers parcels to the webhook URL. `pending`: scheduled, queued, held back, under way, or to be retried."""

    def __init__(self, url: str, secret: str, log: Log) -> None:
        self.defaults = Defaults()
        self.pending = 0
        self._url = url
        self._secret = secret
        self._log = log
        self._queue: asyncio.Queue[OutgoingDelivery] = asyncio.Queue()
        self._open = asyncio.Event()
        self._open.set()

    def schedule(self, delay_s: float, pack: Callable[[], Sequence[OutgoingDelivery]]) -> asyncio.Event:
        """Pack and send parcels after the delay. The event is set once the first was tried, or there was none."""
        tried = asyncio.Event()
        self.pending += 1
        asyncio.get_running_loop().call_later(delay_s, self._dispatch, pack, tried)
        return tried

    def pause(self) -> None:
        """Hold back all deliveries that have not been sent yet."""
        self._open.clear()

    def resume(self) -> None:
        """Send what was held back, and go on."""
        self._open.set()

    async def run(self) -> None:
        """Deliver until cancelled."""
        async with asyncio.TaskGroup() as group:
            for _ in range(MAX_CONNECTIONS):
                group.create_task(self._work())

    async def post_once(self, parcel: OutgoingDelivery) -> DeliveryResult:
        """Send a parcel now, on a connection of its own, paused or not, and never again."""
        connection = HttpConnection(self._url)
        try:
            return await self._attempt(connection, parcel)
        finally:
            connection.close()

    def _dispatch(self, pack: Callable[[], Sequence[OutgoingDelivery]], tried: asyncio.Event) -> None:
        parcels = pack()
        self.pending += len(parcels) - 1
        for parcel in parcels:
            asyncio.get_running_loop().call_later(parcel.delay_s, self._queue.put_nowait, parcel)
        if parcels:
            parcels[0].on_attempt = tried
        else:
            tried.set()

    async def _work(self) -> None:
        connection = HttpConnection(self._url)
        try:
            while True:
                parcel = await self._queue.get()
                await self._open.wait()
                outcome = await self._attempt(connection, parcel)
                self._finish(parcel, outcome)
        finally:
            connection.close()

    def _finish(self, parcel: OutgoingDelivery, outcome: DeliveryResult) -> None:
        parcel.on_attempt.set()
        if outcome.delivered or parcel.attempts >= parcel.max_tries:
            self.pending -= 1
            return
        backoff_s = self.defaults.retry_base_s * 2 ** (parcel.attempts - 1)
        asyncio.get_running_loop().call_later(backoff_s, self._queue.put_nowait, parcel)

    async def _attempt(self, connection: HttpConnection, parcel: OutgoingDelivery) -> DeliveryResult:
        parcel.attempts += 1
        sent_at = time.time()
        timestamp = self._timestamp(parcel, sent_at)
        signature = sign(parcel.secret or self._secret, str(timestamp), parcel.body)
        headers = {"Quiltt-Timestamp": str(timestamp), "Quiltt-Signature": signature}
        try:
            outcome = DeliveryResult(status=await connection.post(parcel.body, headers))
        except (OSError, EOFError, ValueError, asyncio.LimitOverrunError) as error:
            outcome = DeliveryResult(error=type(error).__name__)
        self._log.enter_delivery(
            ids=parcel.ids,
            attempt=parcel.attempts,
            sent_at=sent_at,
            timestamp=timestamp,
            signature_valid=parcel.secret in (None, self._secret),
            status=outcome.status,
            error=outcome.error,
        )
        return outcome

    def _timestamp(self, parcel: OutgoingDelivery, now: float) -> int:
        if parcel.timestamp is not None:
            return parcel.timestamp
        timestamp = int(now) - parcel.age_s
        if self.defaults.keep_signature:
            parcel.timestamp = timestamp  # the same timestamp and body give the same signature
        return timestamp
