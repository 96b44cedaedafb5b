"""Settings: one frozen object, built from `PAYREADY_*` environment variables.

This module is the only reader of the environment. An unknown variable, a bad value or a missing secret stops the start
with one sentence that says what to do.
"""

import functools
import os
import re
from collections.abc import Mapping
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)

from config.task_queues import DEFAULT_CALLBACK_QUEUE, TASK_QUEUES

ENV_PREFIX = "PAYREADY_"
DEMO_SECRET_PREFIX = "demo"  # noqa: S105 - it marks secrets, and is none
"""Secrets that start with this are for demonstrations. Production refuses them."""
EXAMPLE_PRICE_LIST = Path(__file__).with_name("price_list.toml").resolve()
"""The shipped price list. Its price of a production call is invented, so production refuses it."""
HTTP_URL_PATTERN = r"^https?://[^\s?#]+$"
"""A base URL to which paths are appended. Without a scheme no request could be sent, and each call's result would be
unknown."""


BROKER_SCHEMES = ("redis://", "rediss://", "amqp://", "amqps://")
"""Beginnings of the addresses of brokers from which payready can fetch messages."""
MAINTENANCE_INTERVAL_S = 1.0
"""Time between two runs of maintenance: `beat` sends its tasks in this interval."""
MAX_CLAIM_AGE_S = 5
"""Maximum time from a claim to its call. A call with an older claim is not made."""
MAX_PRIORITY = 9
"""Highest priority of a message on Redis."""
RECORD_BUDGET_S = 10
"""Time that a worker has to record a call's result, including its retries while the database is unavailable."""


class ConfigurationError(Exception):
    """The environment does not describe a deployment that may start. The message says what to change."""


def _split(value: object) -> object:
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _require_visible_ascii(value: str | SecretStr) -> str | SecretStr:
    # A space or a control character in an API key breaks the header of each request.
    text = value.get_secret_value() if isinstance(value, SecretStr) else value
    if not re.fullmatch("[!-~]*", text):
        raise ValueError("must have only visible ASCII characters, without spaces")
    return value


def _require_instance_name(value: str) -> str:
    if not re.fullmatch("[a-z0-9-]{1,32}", value):
        raise ValueError("must be 1 to 32 characters of a-z, 0-9 and -, such as live")
    return value


Address = Annotated[str, AfterValidator(_require_visible_ascii)]
"""A URL or the name of a host."""
HttpUrl = Annotated[Address, Field(pattern=HTTP_URL_PATTERN)]
InstanceName = Annotated[str, AfterValidator(_require_instance_name)]
Secret = Annotated[SecretStr, AfterValidator(_require_visible_ascii)]


class Settings(BaseModel):
    """Everything a deployment may choose. Durations are in seconds: their names end in `_s`."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, use_attribute_docstrings=True)

    env: Literal["development", "production"] = "development"
    """`production` refuses demo secrets and the example price list, and logs JSON. `development` refuses API keys whose
    calls are billed."""
    instance: InstanceName | None = None
    """Name of this deployment, if several share a Redis or a RabbitMQ: 1 to 32 characters of `a-z`, `0-9` and `-`. With
    `live` the queue `payments` is `live.payments`. Keys and exchanges begin with `live.` too, but not the results."""

    redis_url: Address = Field("redis://127.0.0.1:6379/0", repr=False)
    """Address of the correlation store. Also of the broker and the result backend, unless `PAYREADY_BROKER_URL` or
    `PAYREADY_RESULT_BACKEND_URL` is set."""
    broker_url: Address | None = Field(None, repr=False)
    """Address of Celery's broker, if it is not Redis at `PAYREADY_REDIS_URL`: Redis (`redis://`, `rediss://`) or
    RabbitMQ (`amqp://`, `amqps://`)."""
    broker_priority_steps: Annotated[tuple[int, ...], BeforeValidator(_split)] = (0, 3, 6, 9)
    """Priorities with a list of their own on Redis: kombu's `priority_steps`, such as `0,1,2`. All apps on the broker
    must have the same steps."""
    broker_priority_separator: str = "\x06\x16"
    """Text between a queue's name and a priority in the name of a list on Redis: kombu's `sep`. All apps on the broker
    must have the same. By default it is kombu's own, the control characters 6 and 22."""
    broker_key_prefix: str = Field("", pattern=r"^[^\s\\]*$")
    """Prefix of all names of the broker on Redis: kombu's `global_keyprefix`. All apps on the broker must have the
    same."""
    result_backend_url: Address | None = Field(None, repr=False)
    """Address of Celery's result backend, if it is not Redis at `PAYREADY_REDIS_URL`."""
    result_key_prefix: str = Field("", pattern=r"^[^\s\\]*$")
    """Prefix of all keys of the result backend: `global_keyprefix` of Celery's `result_backend_transport_options`. All
    apps that read or store the same results must have the same."""
    database_url: str = Field("sqlite:///payready.db", repr=False)
    """`sqlite:///file` or `postgresql://user:password@host/name`."""

    quiltt_api_url: HttpUrl = "https://api.quiltt.io"
    """Base URL of Quiltt's Platform API."""
    quiltt_auth_url: HttpUrl = "https://auth.quiltt.io"
    """Base URL of Quiltt's Auth API. It reports the API key's mode, which decides the price of a call."""
    quiltt_api_key: Secret = SecretStr("demo-api-key")
    """Quiltt's API key secret. Required in production."""
    allow_production_key: bool = False
    """Allow a development deployment to use an API key of Quiltt's PRODUCTION mode, whose calls are billed."""
    quiltt_connect_timeout_s: float = Field(5, gt=0, le=60)
    """Timeout for opening a connection and for a free connection of the pool. After it the call is known not to be
    sent."""
    quiltt_read_timeout_s: float = Field(20, gt=0, le=120)
    """Read timeout. After it, the result of the call is unknown: it may have been accepted and billed."""
    quiltt_max_connections: int = Field(128, ge=1, le=256)
    """Concurrent calls per process. With fewer than the process has threads, some threads wait for a connection."""

    calls_per_s: int = Field(20, ge=1, le=10_000)
    """Refresh calls per second over all replicas. Quiltt documents 25 requests per second and API key."""
    min_time_left_for_call_s: int = Field(5, ge=0, le=600)
    """Minimum time before a payment's deadline for a delayed call. With less, the balance would arrive too late."""
    circuit_breaker_failures: int = Field(10, ge=1, le=1000)
    """Consecutive failed calls (no connection, timeout, 5xx) that open the circuit breaker."""
    balance_polls_per_s: int = Field(10, ge=0, le=1000)
    """Balance polls (free GraphQL reads) per second, for payments that are about to expire. 0 disables polling."""
    balance_poll_lead_s: int = Field(10, ge=1, le=600)
    """Time before a payment's deadline at which its balance is polled, but at most a quarter of its timeout."""
    allow_sync_balances: bool = False
    """Allow a polled balance of source SYNC that is younger than the call to release a payment."""

    webhook_secrets: Annotated[tuple[Secret, ...], BeforeValidator(_split)] = ()
    """The current webhook secret and, during a rotation, the previous one. Without one, every delivery is rejected."""
    webhook_tolerance_s: int = Field(300, ge=1, le=3600)
    """Maximum difference between a delivery's timestamp and our clock, in both directions."""
    webhook_url: Annotated[Address, Field(pattern="^https://.")] | None = None
    """Public address of the webhook endpoint, to which Quiltt delivers. Without it the subscription is not checked."""
    webhook_host: Address = "127.0.0.1"
    """Address on which the webhook endpoint listens."""
    webhook_port: int = Field(8000, ge=0, le=65535)
    """Port on which the webhook endpoint listens."""

    currency: str = Field("USD", pattern=r"^[A-Z]{3}$")
    """Currency of the accounts. Quiltt's balance events do not state one."""
    clock_skew_s: int = Field(5, ge=0, le=300)
    """Maximum difference between the provider's clock and ours. The provider cuts `at` to whole seconds."""
    refresh_balance_time: Literal["at", "arrival"] = "at"
    """Time as of which a balance with source REFRESH is believed. `at`: its own time, but not later than its arrival.
    `arrival`: its arrival. Quiltt does not document which clock `at` is of; choose `arrival` if it is the bank's and
    balances are rejected for their age."""
    funds_hold_s: int = Field(86_400, ge=0, le=864_000)
    """Time for which a released amount is deducted from later balances of its account, from the delivery of the
    outcome. A job may state its own `hold_s`, and the task `payments.end_hold` ends a hold."""
    refresh_window_s: int = Field(60, ge=1, le=3600)
    """Time for which a call counts as in flight. In this time the account is not called again."""
    uncertain_grace_s: int = Field(15, ge=1, le=3600)
    """Time to wait for the event of a call whose result is unknown, before at most one more call."""
    price_list_file: Path = EXAMPLE_PRICE_LIST
    """The price list: price of a call by mode of the API key and by day. Production refuses the shipped example."""
    fee_cap_per_day: Decimal | None = Field(None, ge=0, max_digits=20, decimal_places=6)
    """Maximum total fee of a day (UTC), in the price list's currency. Beyond it payments that need a call fail with
    `fee_cap_reached`. 0 stops all calls. No cap by default."""
    fee_cap_per_month: Decimal | None = Field(None, ge=0, max_digits=20, decimal_places=6)
    """Maximum total fee of a month (UTC), in the price list's currency. No cap by default."""
    call_cap_per_account_per_day: int | None = Field(None, ge=0)
    """Maximum number of calls for one account in a day (UTC). No cap by default."""

    visibility_timeout_s: int = Field(120, ge=5, le=3600)
    """Time after which Redis gives an unacknowledged message to another worker: the delay after a worker's death."""
    callback_queue: str | None = Field(None, pattern=r"^[!-~]{1,200}$")
    """Queue of the payments service. It gets callbacks, and next tasks of a chain, that name no queue. Without it they
    go to `celery`, Celery's default queue, and jobs that have such a callback are logged and counted."""
    result_expires_s: int = Field(86_400, ge=60)
    """Time for which an outcome can be read from the result backend."""
    database_connections: int = Field(40, ge=1, le=200)
    """Maximum connections of a process to PostgreSQL. With fewer than its threads need, threads wait up to 30 s."""
    metrics_port: int = Field(0, ge=0, le=65535)
    """Port for `/metrics`, `/healthz` and `/readyz` of a role, one per process of a host. 0 disables it."""
    metrics_host: Address = "127.0.0.1"
    """Address on which `PAYREADY_METRICS_PORT` listens. Do not expose it outside the deployment."""
    tracing_enabled: bool = False
    """Export OpenTelemetry traces, configured by `OTEL_*` variables. Requires `requirements-otel.txt`."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Lowest level that is logged."""

    @property
    def name_prefix(self) -> str:
        """Prefix of the names of this deployment's queues, exchanges and keys."""
        return f"{self.instance}." if self.instance else ""

    @property
    def effective_broker_url(self) -> str:
        """Address of the broker."""
        return self.broker_url or self.redis_url

    @property
    def effective_result_backend_url(self) -> str:
        """Address of the result backend."""
        return self.result_backend_url or self.redis_url

    @property
    def effective_callback_queue(self) -> str:
        """Queue of callbacks that name no queue."""
        return self.callback_queue or DEFAULT_CALLBACK_QUEUE

    @property
    def clock_skew(self) -> timedelta:
        """`clock_skew_s` as a duration."""
        return timedelta(seconds=self.clock_skew_s)

    @property
    def balance_poll_lead(self) -> timedelta:
        """`balance_poll_lead_s` as a duration."""
        return timedelta(seconds=self.balance_poll_lead_s)

    @property
    def balance_poll_lead_if_enabled(self) -> timedelta | None:
        """`balance_poll_lead`, or None if balances are not polled."""
        return self.balance_poll_lead if self.balance_polls_per_s else None

    @property
    def max_call_duration(self) -> timedelta:
        """Maximum duration of a provider call.

        Four of its waits have the connect timeout: for a free connection of ours, for httpx' pool, for the connection
        and for the write. The read timeout limits each read, so a head that arrives in small parts may take longer. A
        body gets about a second more.
        """
        return timedelta(seconds=4 * self.quiltt_connect_timeout_s + self.quiltt_read_timeout_s)

    @property
    def max_call_and_record_duration(self) -> timedelta:
        """Time from a claim after which a call without a recorded result has lost its worker."""
        return timedelta(seconds=MAX_CLAIM_AGE_S + RECORD_BUDGET_S) + self.max_call_duration

    @model_validator(mode="after")
    def _broker_is_redis_or_rabbitmq(self) -> Self:
        if not self.effective_broker_url.startswith(BROKER_SCHEMES):
            name = "BROKER_URL" if self.broker_url else "REDIS_URL"
            raise ValueError(f"{ENV_PREFIX}{name} must begin with one of {', '.join(BROKER_SCHEMES)}")
        return self

    @model_validator(mode="after")
    def _visibility_timeout_exceeds_call_duration(self) -> Self:
        # Otherwise the broker gives a message to a second worker while the first one makes the call.
        call_s = self.max_call_duration.total_seconds()
        if self.visibility_timeout_s <= call_s:
            raise ValueError(
                f"{ENV_PREFIX}VISIBILITY_TIMEOUT_S must be longer than {call_s:g} s, which a provider call may take"
            )
        return self

    @field_validator("broker_priority_steps")
    @classmethod
    def _priority_steps_begin_at_0_and_ascend(cls, steps: tuple[int, ...]) -> tuple[int, ...]:
        if not steps or steps[0] != 0 or steps[-1] > MAX_PRIORITY or list(steps) != sorted(set(steps)):
            raise ValueError(f"must be ascending numbers from 0 to {MAX_PRIORITY} that begin with 0, such as 0,3,6,9")
        return steps

    @field_validator("broker_priority_separator")
    @classmethod
    def _priority_separator_occurs_in_no_queue_name(cls, separator: str) -> str:
        # Otherwise kombu finds another queue in the name of a list: with the separator "m", `payments` is `pay`.
        if re.search(r"[\s\\]", separator) or re.fullmatch(r"[\w.@-]*", separator):
            raise ValueError(
                "must have a character that no queue name has, such as a colon, and no space or backslash; "
                "leave it unset for kombu's default"
            )
        return separator

    @model_validator(mode="after")
    def _callback_queue_is_none_of_payready(self) -> Self:
        if self.callback_queue in {f"{self.name_prefix}{queue}" for queue in TASK_QUEUES.values()}:
            raise ValueError(
                f"{ENV_PREFIX}CALLBACK_QUEUE must be a queue of the payments service: "
                f"payready's own workers consume {self.callback_queue}"
            )
        return self

    def permits_api_key_mode(self, mode: str) -> bool:
        """Whether this deployment may use an API key of this mode: calls of PRODUCTION keys are billed."""
        return mode != "PRODUCTION" or self.env == "production" or self.allow_production_key

    @model_validator(mode="after")
    def _production_needs_real_secrets(self) -> Self:
        if self.env == "production":
            _require_real("QUILTT_API_KEY", self.quiltt_api_key)
            if not self.webhook_secrets:
                raise ValueError(f"{ENV_PREFIX}WEBHOOK_SECRETS must be set in production")
            for secret in self.webhook_secrets:
                _require_real("WEBHOOK_SECRETS", secret)
        return self

    @model_validator(mode="after")
    def _production_needs_its_own_price_list(self) -> Self:
        # Fee entries are append-only: an invented price cannot be corrected later.
        if self.env == "production" and self.price_list_file.resolve() == EXAMPLE_PRICE_LIST:
            raise ValueError(
                f"{ENV_PREFIX}PRICE_LIST_FILE must be set in production, to a price list with your contract's prices"
            )
        return self


def _require_real(name: str, secret: SecretStr) -> None:
    if secret.get_secret_value().startswith(DEMO_SECRET_PREFIX):
        raise ValueError(f"{ENV_PREFIX}{name} must be set in production, and not to a demo value")


def load_rejecting_unknown(environ: Mapping[str, str]) -> Settings:
    """Build the settings from `environ`.

    Space around a value is ignored: a file with a secret usually ends with a newline.

    Raises:
        ConfigurationError: a `PAYREADY_*` variable is unknown or has a bad value, or a secret is missing.
    """
    known = {ENV_PREFIX + name.upper() for name in Settings.model_fields}
    unknown = sorted(name for name in environ if name.startswith(ENV_PREFIX) and name not in known)
    if unknown:
        raise ConfigurationError(
            f"{unknown[0]} is not a setting of payready; docs/reference/configuration.md lists the settings"
        )
    given = {name: value for name in sorted(known) if (value := environ.get(name, "").strip())}
    for name, value in given.items():
        if not value.isprintable():
            raise ConfigurationError(f"{name}: must have no line break or other control character")
    values = {name.removeprefix(ENV_PREFIX).lower(): value for name, value in given.items()}
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        raise ConfigurationError(_first_error(error)) from None


def _first_error(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    message = first["msg"].removeprefix("Value error, ")
    return f"{ENV_PREFIX}{str(first['loc'][0]).upper()}: {message}" if first["loc"] else message


@functools.cache
def settings() -> Settings:
    """Return the settings of this process."""
    return load_rejecting_unknown(os.environ)
