"""The only place that builds clients. Everything else is given them."""

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from config.settings import Settings, settings
from worker.caps import Caps
from worker.correlation.client import connect
from worker.correlation.gate import Budget, Gate
from worker.correlation.store import Correlation
from worker.errors import CallFailed, Reason, Refused, Unsent
from worker.fees import Price, PriceList, PriceListError, read_prices
from worker.ledger.database import Engine, open_engine
from worker.ledger.fees import Spending
from worker.provider import Mode, Quiltt
from worker.subscriptions import Subscriptions

ASK_AGAIN = timedelta(seconds=2)
"""After this long a question that the provider did not answer is asked again."""


def utc_now() -> datetime:
    """The clock of production."""
    return datetime.now(UTC)


@dataclass
class Runtime:
    """What the flow works with."""

    settings: Settings
    engine: Engine
    correlation: Correlation
    gate: Gate
    reads: Budget
    provider: Quiltt
    prices: PriceList
    clock: Callable[[], datetime] = utc_now
    spending: Spending = field(default_factory=Spending, init=False)
    _mode: Mode | None = field(default=None, init=False)
    _trouble: tuple[datetime, CallFailed] | None = field(default=None, init=False)
    _asking: threading.Lock = field(default_factory=threading.Lock, init=False)

    @property
    def caps(self) -> Caps:
        """What may be spent."""
        chosen = self.settings
        return Caps(chosen.fee_cap_per_day, chosen.fee_cap_per_month, chosen.fee_calls_per_account_per_day)

    def mode(self) -> Mode:
        """The provider's environment that our key belongs to. The provider is asked once.

        Raises:
            Unsent: it could not be asked.
            Refused: the key is wrong, or is a production key where none may be used.
        """
        with self._asking:
            if self._mode is None:
                self._mode = self._ask()
            return self._mode

    def price(self, mode: Mode, at: datetime) -> Price:
        """What a call costs that is made at this time.

        Raises:
            Unsent: the price list has no price for it.
        """
        try:
            return self.prices.on(mode, at.astimezone(UTC).date())
        except PriceListError as error:
            raise Unsent(str(error)) from error

    def _ask(self) -> Mode:
        """Ask for the mode; who had to wait while someone else asked in vain does not ask again at once."""
        now = self.clock()
        if self._trouble is not None and now - self._trouble[0] < ASK_AGAIN:
            raise self._trouble[1]
        try:
            return self._allowed(self.provider.mode())
        except CallFailed as failure:
            self._trouble = (self.clock(), failure)
            raise

    def _allowed(self, mode: Mode) -> Mode:
        if mode == "PRODUCTION" and self.settings.env != "production" and not self.settings.allow_production_key:
            raise Refused(
                403, Reason.NOT_AUTHORIZED, "a production key is used in development; see PAYREADY_ALLOW_PRODUCTION_KEY"
            )
        return mode


def build(settings: Settings) -> Runtime:
    """Make the clients; none of them connects before it is used."""
    provider = Quiltt(
        settings.quiltt_api_url,
        settings.quiltt_auth_url,
        settings.quiltt_api_key,
        connect_timeout_s=settings.quiltt_connect_timeout_s,
        read_timeout_s=settings.quiltt_read_timeout_s,
        connections=settings.quiltt_connections,
    )
    redis = connect(settings.redis_url)
    return Runtime(
        settings=settings,
        engine=open_engine(settings.database_url),
        correlation=Correlation(redis),
        gate=Gate(
            redis,
            calls_per_s=settings.calls_per_s,
            failures=settings.breaker_failures,
            probe_limit=settings.call_limit,
        ),
        reads=Budget(redis, "reads", per_s=settings.reads_per_s),
        provider=provider,
        prices=read_prices(settings.fees_file.read_text()),
    )


def subscriptions(settings: Settings) -> Subscriptions:
    """The provider's webhook subscriptions, asked for by few, and seldom."""
    return Subscriptions(
        settings.quiltt_api_url,
        settings.quiltt_api_key,
        connect_timeout_s=settings.quiltt_connect_timeout_s,
        read_timeout_s=settings.quiltt_read_timeout_s,
    )


@functools.cache
def runtime() -> Runtime:
    """The runtime of this process, made at its first use (after any fork)."""
    return build(settings())
