"""Dependency wiring: the only module that builds clients. All other code receives them as arguments."""

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from config.clock import utc_now
from config.settings import Settings, settings
from worker.correlation.admission import AdmissionControl, AnnouncedAdmission, RateLimiter, api_key_digest
from worker.correlation.dashboard_logins import DashboardSessions, LoginAttempts
from worker.correlation.redis_client import RedisServer, create_client
from worker.correlation.store import CorrelationStore
from worker.errors import CallFailed, CallNotPriced, CallRejected, FailureReason
from worker.ledger.cap_usage import CapUsageCounter
from worker.ledger.engine import Engine, open_engine
from worker.quiltt.client import ApiKeyMode, QuilttClient
from worker.quiltt.subscriptions import SubscriptionsClient
from worker.rules.fee_caps import FeeCaps
from worker.rules.pricing import Price, PriceList, PriceListError, parse_price_list

MODE_RETRY_DELAY = timedelta(seconds=2)
"""Time after a failed key introspection in which other threads get its error without another request."""


@dataclass(frozen=True, kw_only=True)
class _FailedIntrospection:
    """The last failed introspection of the API key."""

    at: datetime
    error: CallFailed


@dataclass
class Runtime:
    """Settings, clients and clock of a process."""

    settings: Settings
    engine: Engine
    correlation: CorrelationStore
    admission: AdmissionControl
    announced_admission: AnnouncedAdmission
    poll_limiter: RateLimiter
    redis_server: RedisServer
    provider: QuilttClient
    price_list: PriceList
    clock: Callable[[], datetime] = utc_now
    cap_usage: CapUsageCounter = field(default_factory=CapUsageCounter, init=False)
    _api_key_mode: ApiKeyMode | None = field(default=None, init=False)
    _failed_introspection: _FailedIntrospection | None = field(default=None, init=False)
    _mode_lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    @property
    def fee_caps(self) -> FeeCaps:
        """The fee caps of the settings."""
        return FeeCaps(
            per_day=self.settings.fee_cap_per_day,
            per_month=self.settings.fee_cap_per_month,
            calls_per_account=self.settings.call_cap_per_account_per_day,
        )

    def fetch_allowed_api_key_mode_once(self) -> ApiKeyMode:
        """Introspect the API key by a request to the provider, once in a process, and return its mode.

        Other threads wait for the request. The mode is cached after the first success.

        Raises:
            CallNotSent: the provider could not introspect the key.
            CallRejected: the key is wrong, or a production key is used outside production.
        """
        with self._mode_lock:
            if self._api_key_mode is None:
                self._api_key_mode = self._fetch_allowed_mode_or_recent_error()
            return self._api_key_mode

    def call_price(self, mode: ApiKeyMode, at: datetime) -> Price:
        """Return the price of a call that is made at this time.

        Raises:
            CallNotPriced: the price list has no price for it, so the call must not be made.
        """
        try:
            return self.price_list.price_for(mode, at.astimezone(UTC).date())
        except PriceListError as error:
            raise CallNotPriced(str(error)) from error

    def _fetch_allowed_mode_or_recent_error(self) -> ApiKeyMode:
        """Introspect the key; reject a production key outside production. A failure is raised again for 2 s."""
        last_failed = self._failed_introspection
        if last_failed is not None and self.clock() - last_failed.at < MODE_RETRY_DELAY:
            raise last_failed.error
        try:
            return self._require_allowed(self.provider.introspect_api_key())
        except CallFailed as error:
            self._failed_introspection = _FailedIntrospection(at=self.clock(), error=error)
            raise

    def _require_allowed(self, mode: ApiKeyMode) -> ApiKeyMode:
        if not self.settings.permits_api_key_mode(mode):
            detail = "the API key is a production key; set PAYREADY_ALLOW_PRODUCTION_KEY to use it outside production"
            raise CallRejected(403, FailureReason.NOT_AUTHORIZED, detail)
        return mode


def build_runtime(settings: Settings) -> Runtime:
    """Build the clients. None of them connects before its first use."""
    provider = QuilttClient(
        settings.quiltt_api_url,
        settings.quiltt_auth_url,
        settings.quiltt_api_key,
        connect_timeout_s=settings.quiltt_connect_timeout_s,
        read_timeout_s=settings.quiltt_read_timeout_s,
        max_connections=settings.quiltt_max_connections,
        proxy_url=settings.quiltt_proxy_url,
        ca_file=settings.quiltt_ca_file,
    )
    redis = create_client(settings.redis_url)
    key_digest = api_key_digest(settings.quiltt_api_key.get_secret_value())
    admission = AdmissionControl(
        redis,
        key_digest,
        calls_per_s=settings.calls_per_s,
        failure_threshold=settings.circuit_breaker_failures,
        probe_timeout=settings.max_call_and_record_duration,
    )
    return Runtime(
        settings=settings,
        engine=open_engine(
            settings.database_url, connections=settings.database_connections, pooler=settings.database_pooler
        ),
        correlation=CorrelationStore(redis, key_prefix=settings.name_prefix),
        admission=admission,
        announced_admission=AnnouncedAdmission(
            redis, key_prefix=settings.name_prefix, burst_duration=admission.limiter.burst_duration
        ),
        poll_limiter=RateLimiter(
            redis, f"payready:poll_limiter:{key_digest}", requests_per_s=settings.balance_polls_per_s
        ),
        redis_server=RedisServer(redis),
        provider=provider,
        price_list=parse_price_list(settings.price_list_file.read_text()),
    )


def subscriptions_client(settings: Settings) -> SubscriptionsClient:
    """Build the client for the provider's webhook subscriptions."""
    return SubscriptionsClient(
        settings.quiltt_api_url,
        settings.quiltt_api_key,
        connect_timeout_s=settings.quiltt_connect_timeout_s,
        read_timeout_s=settings.quiltt_read_timeout_s,
        proxy_url=settings.quiltt_proxy_url,
        ca_file=settings.quiltt_ca_file,
    )


def build_dashboard_login_stores(settings: Settings) -> tuple[DashboardSessions, LoginAttempts]:
    """Build the stores of the dashboard's sessions and failed logins. They connect at their first use."""
    redis = create_client(settings.redis_url)
    prefix = settings.name_prefix
    return DashboardSessions(redis, key_prefix=prefix), LoginAttempts(redis, key_prefix=prefix)


@functools.cache
def runtime() -> Runtime:
    """Return the runtime of this process. It is built at its first use, after any fork."""
    return build_runtime(settings())
