"""The only place that builds clients. Everything else is given them."""

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from config.settings import Settings, settings
from worker.correlation.admission import AdmissionControl, RateLimiter
from worker.correlation.redis_client import create_client
from worker.correlation.store import CorrelationStore
from worker.errors import CallFailed, CallNotSent, CallRejected, Reason
from worker.ledger.cap_usage import CapUsageCounter
from worker.ledger.engine import Engine, open_engine
from worker.quiltt.client import ApiKeyMode, QuilttClient
from worker.quiltt.subscriptions import SubscriptionsClient
from worker.rules.fee_caps import FeeCaps
from worker.rules.pricing import Price, PriceList, PriceListError, parse_price_list

MODE_RETRY_DELAY = timedelta(seconds=2)
"""After this long a question that the provider did not answer is asked again."""


def utc_now() -> datetime:
    """The clock of production."""
    return datetime.now(UTC)


@dataclass
class Runtime:
    """What the flow works with."""

    settings: Settings
    engine: Engine
    correlation: CorrelationStore
    admission: AdmissionControl
    poll_limiter: RateLimiter
    provider: QuilttClient
    price_list: PriceList
    clock: Callable[[], datetime] = utc_now
    cap_usage: CapUsageCounter = field(default_factory=CapUsageCounter, init=False)
    _api_key_mode: ApiKeyMode | None = field(default=None, init=False)
    _last_mode_error: tuple[datetime, CallFailed] | None = field(default=None, init=False)
    _mode_lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    @property
    def fee_caps(self) -> FeeCaps:
        """What may be spent."""
        chosen = self.settings
        return FeeCaps(chosen.fee_cap_per_day, chosen.fee_cap_per_month, chosen.call_cap_per_account_per_day)

    def api_key_mode(self) -> ApiKeyMode:
        """The provider's environment that our key belongs to. The provider is asked once.

        Raises:
            CallNotSent: it could not be asked.
            CallRejected: the key is wrong, or is a production key where none may be used.
        """
        with self._mode_lock:
            if self._api_key_mode is None:
                self._api_key_mode = self._fetch_key_mode()
            return self._api_key_mode

    def call_price(self, mode: ApiKeyMode, at: datetime) -> Price:
        """What a call costs that is made at this time.

        Raises:
            CallNotSent: the price list has no price for it.
        """
        try:
            return self.price_list.price_for(mode, at.astimezone(UTC).date())
        except PriceListError as error:
            raise CallNotSent(str(error)) from error

    def _fetch_key_mode(self) -> ApiKeyMode:
        """Ask for the mode; who had to wait while someone else asked in vain does not ask again at once."""
        now = self.clock()
        if self._last_mode_error is not None and now - self._last_mode_error[0] < MODE_RETRY_DELAY:
            raise self._last_mode_error[1]
        try:
            return self._require_allowed(self.provider.api_key_mode())
        except CallFailed as failure:
            self._last_mode_error = (self.clock(), failure)
            raise

    def _require_allowed(self, mode: ApiKeyMode) -> ApiKeyMode:
        if mode == "PRODUCTION" and self.settings.env != "production" and not self.settings.allow_production_key:
            raise CallRejected(
                403, Reason.NOT_AUTHORIZED, "a production key is used in development; see PAYREADY_ALLOW_PRODUCTION_KEY"
            )
        return mode


def build_runtime(settings: Settings) -> Runtime:
    """Make the clients; none of them connects before it is used."""
    provider = QuilttClient(
        settings.quiltt_api_url,
        settings.quiltt_auth_url,
        settings.quiltt_api_key,
        connect_timeout_s=settings.quiltt_connect_timeout_s,
        read_timeout_s=settings.quiltt_read_timeout_s,
        max_connections=settings.quiltt_max_connections,
    )
    redis = create_client(settings.redis_url)
    return Runtime(
        settings=settings,
        engine=open_engine(settings.database_url),
        correlation=CorrelationStore(redis),
        admission=AdmissionControl(
            redis,
            calls_per_s=settings.calls_per_s,
            failure_threshold=settings.circuit_breaker_failures,
            probe_timeout=settings.max_call_duration,
        ),
        poll_limiter=RateLimiter(redis, "poll_limiter", requests_per_s=settings.balance_polls_per_s),
        provider=provider,
        price_list=parse_price_list(settings.price_list_file.read_text()),
    )


def subscriptions_client(settings: Settings) -> SubscriptionsClient:
    """The provider's webhook subscriptions, asked for by few, and seldom."""
    return SubscriptionsClient(
        settings.quiltt_api_url,
        settings.quiltt_api_key,
        connect_timeout_s=settings.quiltt_connect_timeout_s,
        read_timeout_s=settings.quiltt_read_timeout_s,
    )


@functools.cache
def runtime() -> Runtime:
    """The runtime of this process, made at its first use (after any fork)."""
    return build_runtime(settings())
