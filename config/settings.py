"""The settings: one frozen object, made from `PAYREADY_*` variables, the only reader of the environment.

A variable that is misspelt, missing or unsafe stops the start with one sentence that says what to do.
"""

import functools
import os
from collections.abc import Mapping
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, ValidationError, model_validator

PREFIX = "PAYREADY_"
DEMO_MARK = "demo"
"""Secrets that start with this word are for demonstrations; production refuses them."""
ADDRESS = r"^https?://[^\s?#]+$"
"""Paths are put after it. Without a scheme nothing could be sent, and each call would seem to be of unknown fate."""


class ConfigurationError(Exception):
    """The environment does not describe a deployment that may start; the message says what to change."""


def _split(value: object) -> object:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


class Settings(BaseModel):
    """Everything a deployment may choose. Durations are in seconds, as their names say."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, use_attribute_docstrings=True)

    env: Literal["development", "production"] = "development"
    """`production` refuses demo secrets and logs JSON; `development` refuses keys whose calls are billed."""

    redis_url: str = Field("redis://127.0.0.1:6379/0", repr=False)
    """Correlation store; also broker and result backend unless the next two say otherwise."""
    broker_url: str | None = Field(None, repr=False)
    """Celery's broker, if it is not Redis at `PAYREADY_REDIS_URL`."""
    broker_transport: Literal["atomic", "kombu"] = "atomic"
    """How workers take messages from Redis. `kombu`: as Celery does by itself, for a Redis behind a proxy that allows
    neither RESP3 nor CLIENT TRACKING; a worker that is killed then loses the message it was just taking."""
    result_backend_url: str | None = Field(None, repr=False)
    """Celery's result backend, if it is not Redis at `PAYREADY_REDIS_URL`."""
    database_url: str = Field("sqlite:///payready.db", repr=False)
    """`sqlite:///file` or `postgresql://user:password@host/name`."""

    quiltt_api_url: str = Field("https://api.quiltt.io", pattern=ADDRESS)
    """Where balances are refreshed."""
    quiltt_auth_url: str = Field("https://auth.quiltt.io", pattern=ADDRESS)
    """Where the API key's environment is asked for: its mode decides the price of a call."""
    quiltt_api_key: SecretStr = SecretStr("demo-api-key")
    """Quiltt's API key secret. Production needs it set."""
    allow_production_key: bool = False
    """Lets a development deployment use a key of Quiltt's PRODUCTION mode, which is billed."""
    quiltt_connect_timeout_s: float = Field(5, gt=0, le=60)
    """How long to wait for a connection, and for a free one of the pool. Beyond it a call is known not to be sent."""
    quiltt_read_timeout_s: float = Field(20, gt=0, le=120)
    """How long to wait for an answer. Beyond it nobody knows whether the call was accepted."""
    quiltt_connections: int = Field(128, ge=1, le=256)
    """Calls in flight per process; no fewer than its threads, or some wait for others."""

    calls_per_s: int = Field(20, ge=1, le=10_000)
    """Refresh calls a second, over all replicas. Quiltt documents 25 requests a second per key."""
    answer_within_s: int = Field(5, ge=0, le=600)
    """A call that had to wait is made only for payments that have at least so long left: a balance takes its time."""
    breaker_failures: int = Field(10, ge=1, le=1000)
    """So many calls in a row without any answer of sense (no connection, time-outs, 5xx) stop all calls for a while."""
    reads_per_s: int = Field(10, ge=0, le=1000)
    """Free reads of a balance by GraphQL a second, for payments that are about to expire; 0: none."""
    read_ahead_s: int = Field(10, ge=1, le=600)
    """How long before its deadline such a payment's balance is read, but no more than a quarter of its timeout."""
    sync_may_release: bool = False
    """Whether such a read may release a payment by a balance of source SYNC that is younger than its call."""

    webhook_secrets: Annotated[tuple[SecretStr, ...], BeforeValidator(_split)] = ()
    """The current secret and, while it is being rotated, the previous one. None: every delivery is refused."""
    webhook_window_s: int = Field(300, ge=1, le=3600)
    """How far a delivery's timestamp may be from our clock, either way."""
    webhook_url: str | None = Field(None, pattern=r"^https://[^\s]+$")
    """The public address of the webhook endpoint, as Quiltt delivers to it. None: the subscription is not checked."""
    host: str = "127.0.0.1"
    """The address that the webhook endpoint listens on."""
    port: int = Field(8000, ge=0, le=65535)
    """The port that the webhook endpoint listens on."""

    currency: str = Field("USD", pattern=r"^[A-Z]{3}$")
    """The currency of the accounts. Quiltt's balance events name none."""
    clock_skew_s: int = Field(5, ge=0, le=300)
    """How far the provider's clock and ours may be apart; `at` is also cut to whole seconds."""
    refresh_window_s: int = Field(60, ge=1, le=3600)
    """How long a call counts as in flight: within it the account is not called again."""
    uncertain_grace_s: int = Field(15, ge=1, le=3600)
    """How long to wait for the event of a call whose acceptance is unknown, before one more call."""
    fees_file: Path = Path(__file__).with_name("fees.toml")
    """The price list: what a call costs, by the mode of the key's environment and by day."""
    fee_cap_per_day: Decimal | None = Field(None, ge=0, max_digits=20, decimal_places=6)
    """What all calls of a day (UTC) may cost together, in the price list's currency; beyond it payments that need a
    call fail as `fee_cap_reached`. No cap unless it is set."""
    fee_cap_per_month: Decimal | None = Field(None, ge=0, max_digits=20, decimal_places=6)
    """The same for a month (UTC)."""
    fee_calls_per_account_per_day: int | None = Field(None, ge=0)
    """How many calls may be made for one account in a day (UTC). No cap unless it is set."""

    visibility_timeout_s: int = Field(120, ge=5, le=3600)
    """How long a message may be worked on before Redis gives it to another worker: the wait after a worker's death."""
    result_expires_s: int = Field(86_400, ge=60)
    """How long an outcome can be read from the result backend."""
    metrics_port: int = Field(0, ge=0, le=65535)
    """The port for `/metrics`, `/healthz` and `/readyz` of a role, one for each process of a host; 0: none."""
    metrics_host: str = "127.0.0.1"
    """The address that `PAYREADY_METRICS_PORT` is listened on at. Not to be reached from outside."""
    traces: bool = False
    """Whether traces are told to OpenTelemetry, which `OTEL_*` variables set up. Needs the extra `payready[otel]`."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """The least level that is logged."""

    @property
    def broker(self) -> str:
        """The broker's address."""
        return self.broker_url or self.redis_url

    @property
    def result_backend(self) -> str:
        """The result backend's address."""
        return self.result_backend_url or self.redis_url

    @property
    def clock_skew(self) -> timedelta:
        """`clock_skew_s` as a duration."""
        return timedelta(seconds=self.clock_skew_s)

    @property
    def read_ahead(self) -> timedelta:
        """`read_ahead_s` as a duration."""
        return timedelta(seconds=self.read_ahead_s)

    @property
    def call_limit(self) -> timedelta:
        """After this long a call that was not booked has lost its worker: its time limits, with room to book it."""
        return timedelta(seconds=self.quiltt_connect_timeout_s * 4 + self.quiltt_read_timeout_s + 10)

    @model_validator(mode="after")
    def _no_call_is_doubled(self) -> Self:
        if self.visibility_timeout_s <= 2 * self.quiltt_connect_timeout_s + self.quiltt_read_timeout_s:
            raise ValueError(f"{PREFIX}VISIBILITY_TIMEOUT_S must be longer than a provider call may take")
        return self

    @model_validator(mode="after")
    def _production_needs_real_secrets(self) -> Self:
        if self.env == "production":
            _require_real("QUILTT_API_KEY", self.quiltt_api_key)
            if not self.webhook_secrets:
                raise ValueError(f"{PREFIX}WEBHOOK_SECRETS must be set in production")
            for secret in self.webhook_secrets:
                _require_real("WEBHOOK_SECRETS", secret)
        return self


def _require_real(name: str, secret: SecretStr) -> None:
    if secret.get_secret_value().startswith(DEMO_MARK):
        raise ValueError(f"{PREFIX}{name} must be set in production, and not to a demo value")


def load(environ: Mapping[str, str]) -> Settings:
    """Make the settings from `environ`.

    Raises:
        ConfigurationError: a `PAYREADY_*` variable is unknown, has a bad value, or a secret is missing.
    """
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    unknown = sorted(name for name in environ if name.startswith(PREFIX) and name not in known)
    if unknown:
        raise ConfigurationError(f"{unknown[0]} is not a setting of payready; see docs/configuration.md for the names")
    values = {name[len(PREFIX) :].lower(): environ[name] for name in known if environ.get(name)}
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        raise ConfigurationError(_sentence(error)) from None


def _sentence(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    message = first["msg"].removeprefix("Value error, ")
    return f"{PREFIX}{str(first['loc'][0]).upper()}: {message}" if first["loc"] else message


@functools.cache
def settings() -> Settings:
    """The settings of this process."""
    return load(os.environ)
