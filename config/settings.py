"""Settings: one frozen object, built from `PAYREADY_*` environment variables.

This module is the only reader of the environment. An unknown variable or a bad value stops the start with one sentence
that says what to do. `config.role_settings` states what each role must have.
"""

import functools
import os
import re
from collections.abc import Mapping
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, SecretStr, ValidationError, model_validator

from config import production_rules
from config.dashboard_settings import DashboardSettings
from config.database_addresses import DatabaseUrl, require_options_that_transactions_can_set
from config.redis_addresses import require_usable_addresses
from config.setting_types import (
    ENV_PREFIX,
    Address,
    CallbackQueue,
    CertificateFile,
    HttpUrl,
    InstanceName,
    PrioritySeparator,
    PrioritySteps,
    ProxyUrl,
    Secret,
    Secrets,
    variable_name,
)
from config.task_queues import DEFAULT_CALLBACK_QUEUE, TASK_QUEUES

PLATFORM_PORT = "PORT"
"""Variable by which a platform, such as Heroku, states the port of the role `web`."""
MAINTENANCE_INTERVAL_S = 1.0
"""Time between two runs of maintenance: `beat` sends its tasks in this interval."""
MAX_CLAIM_AGE_S = 5
"""Maximum time from a claim to its call. A call with an older claim is not made."""
RECORD_BUDGET_S = 10
"""Time that a worker has to record a call's result, including its retries while the database is unavailable."""


class ConfigurationError(Exception):
    """The environment does not describe a deployment that may start. The message says what to change."""


class Settings(DashboardSettings):
    """Everything a deployment may choose. Durations are in seconds: their names end in `_s`."""

    env: Literal["development", "production"] = "development"
    """`production` refuses demo secrets and the example price list, and logs JSON. `development` refuses API keys whose
    calls are billed."""
    instance: InstanceName | None = None
    """Name of this deployment, if several share a Redis or a RabbitMQ: 1 to 32 characters of `a-z`, `0-9` and `-`. With
    `live` the queue `payments` is `live.payments`. Keys and exchanges begin with `live.` too, but not the results."""

    redis_url: Address = Field("redis://127.0.0.1:6379/0", repr=False)
    """Address of the correlation store: Redis, with TLS, a Unix socket, Sentinels, or a cluster
    (docs/howto/use-redis-topologies.md). Also of the broker and the result backend, unless `PAYREADY_BROKER_URL` or
    `PAYREADY_RESULT_BACKEND_URL` is set."""
    broker_url: Address | None = Field(None, repr=False)
    """Address of Celery's broker, if it is not Redis at `PAYREADY_REDIS_URL`: another Redis that is no cluster, or
    RabbitMQ (`amqp://`, `amqps://`)."""
    broker_priority_steps: PrioritySteps = (0, 3, 6, 9)
    """Priorities with a list of their own on Redis: kombu's `priority_steps`, such as `0,1,2`. All apps on the broker
    must have the same steps."""
    broker_priority_separator: PrioritySeparator = "\x06\x16"
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
    database_url: DatabaseUrl = Field("sqlite:///payready.db", repr=False)
    """Address of the ledger: `postgresql://user:password@host:port/name`, with options of libpq after a `?`, or
    `sqlite:///file` for roles on one host. Several hosts are separated by commas; a socket is `?host=/folder`."""

    quiltt_api_url: HttpUrl = "https://api.quiltt.io"
    """Base URL of Quiltt's Platform API."""
    quiltt_auth_url: HttpUrl = "https://auth.quiltt.io"
    """Base URL of Quiltt's Auth API. It reports the API key's mode, which decides the price of a call."""
    quiltt_api_key: Secret = SecretStr("demo-api-key")
    """Quiltt's API key secret. In production `worker` and `refresh` require it; no other role needs it."""
    quiltt_proxy_url: ProxyUrl | None = Field(None, repr=False)
    """Proxy for all requests to Quiltt: `http://user:password@host:port`. It must support CONNECT, and sees no request.
    The variables `HTTPS_PROXY` and `ALL_PROXY` have no effect."""
    quiltt_ca_file: CertificateFile | None = None
    """PEM file of the certificate authorities that may certify Quiltt, in place of the public ones: for a gateway or a
    proxy with a private authority."""
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

    webhook_secrets: Secrets = ()
    """The current webhook secret and, during a rotation, the previous one. Without one, every delivery is rejected. In
    production `web` requires it, with at least 16 characters; no other role needs it."""
    webhook_tolerance_s: int = Field(300, ge=1, le=3600)
    """Maximum difference between a delivery's timestamp and our clock, in both directions."""
    webhook_url: Annotated[Address, Field(pattern="^https://.")] | None = None
    """Public address of the webhook endpoint, to which Quiltt delivers. Without it the subscription is not checked."""
    webhook_host: Address = "127.0.0.1"
    """Address on which the webhook endpoint listens."""
    webhook_port: int = Field(8000, ge=0, le=65535)
    """Port on which the webhook endpoint listens. If it is not set, `PORT` counts, which platforms such as Heroku
    set."""
    drain_s: int = Field(5, ge=0, le=600)
    """Time for which `web` still serves requests after SIGTERM. `/readyz` then returns 503, and each response closes
    its connection, so that proxies choose another process."""

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
    price_list_file: Path = production_rules.EXAMPLE_PRICE_LIST
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
    callback_queue: CallbackQueue | None = None
    """Queue of the payments service. It gets callbacks, and next tasks of a chain, that name no queue. Without it they
    go to `celery`, Celery's default queue, and jobs that have such a callback are logged and counted."""
    result_expires_s: int = Field(86_400, ge=60)
    """Time for which an outcome can be read from the result backend."""
    database_connections: int = Field(40, ge=1, le=200)
    """Maximum connections of a process to PostgreSQL. With fewer than its threads need, threads wait up to 30 s."""
    database_pooler: Literal["none", "transaction"] = "none"
    """`transaction`: a pooler such as PgBouncer is between payready and PostgreSQL. Transactions then use no prepared
    statements, and no settings of the session."""
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
        and for the write. A proxy adds three: to write the request for a tunnel, to read the response, and for TLS
        with the provider. The read timeout limits each read, so a head that arrives in small parts may take longer. A
        body gets about a second more.
        """
        waits = 7 if self.quiltt_proxy_url else 4
        return timedelta(seconds=waits * self.quiltt_connect_timeout_s + self.quiltt_read_timeout_s)

    @property
    def max_call_and_record_duration(self) -> timedelta:
        """Time from a claim after which a call without a recorded result has lost its worker."""
        return timedelta(seconds=MAX_CLAIM_AGE_S + RECORD_BUDGET_S) + self.max_call_duration

    @model_validator(mode="after")
    def _redis_addresses_are_usable(self) -> Self:
        require_usable_addresses(
            prefix=ENV_PREFIX,
            redis_url=self.redis_url,
            broker_url=self.broker_url,
            results_url=self.result_backend_url,
        )
        return self

    @model_validator(mode="after")
    def _transactions_can_set_options(self) -> Self:
        if self.database_pooler == "transaction":
            require_options_that_transactions_can_set(self.database_url)
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
    def _proxy_cannot_read_requests(self) -> Self:
        # A proxy receives an http request itself, and may respond in the provider's place: the bill would be wrong.
        if self.quiltt_proxy_url:
            for name in ("quiltt_api_url", "quiltt_auth_url"):
                if not getattr(self, name).startswith("https://"):
                    raise ValueError(f"{variable_name(name)} must begin with https:// to be reached through a proxy")
        return self

    @model_validator(mode="after")
    def _production_has_no_demo_values(self) -> Self:
        if self.env == "production":
            if "quiltt_api_key" in self.model_fields_set:  # `role_settings` requires it of the roles that use it
                production_rules.refuse_demo_secret("quiltt_api_key", self.quiltt_api_key)
            for secret in self.webhook_secrets:
                production_rules.refuse_demo_or_short_secret("webhook_secrets", secret)
            production_rules.refuse_http_unless_loopback("quiltt_api_url", self.quiltt_api_url)
            production_rules.refuse_http_unless_loopback("quiltt_auth_url", self.quiltt_auth_url)
            production_rules.refuse_example_price_list("price_list_file", self.price_list_file)
        return self


def load_rejecting_unknown(environ: Mapping[str, str]) -> Settings:
    """Build the settings from `environ`.

    Space around a value is ignored: a file with a secret usually ends with a newline.

    Raises:
        ConfigurationError: a `PAYREADY_*` variable is unknown or has a bad value.
    """
    variables = {name: variable_name(name) for name in Settings.model_fields}
    unknown = sorted(name for name in environ if name.startswith(ENV_PREFIX) and name not in variables.values())
    if unknown:
        raise ConfigurationError(
            f"{unknown[0]} is not a setting of payready; docs/reference/configuration.md lists the settings"
        )
    if _is_port(_platform_port(environ)):  # else `web` refuses it: no other role reads it
        variables["webhook_port"] = PLATFORM_PORT
    values = {name: value for name, variable in variables.items() if (value := environ.get(variable, "").strip())}
    for name, value in values.items():
        if not value.isprintable():
            raise ConfigurationError(f"{variables[name]}: must have no line break or other control character")
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        raise ConfigurationError(_first_error(error, variables)) from None


def require_usable_platform_port(environ: Mapping[str, str]) -> None:
    """Raise `ConfigurationError` if the platform states the port of `web`, and it is none."""
    if _platform_port(environ) and not _is_port(_platform_port(environ)):
        raise ConfigurationError(f"{PLATFORM_PORT}: must be a number from 0 to 65535")


def _platform_port(environ: Mapping[str, str]) -> str:
    """Return `PORT`, or an empty text if our own setting counts."""
    own_port = environ.get(variable_name("webhook_port"), "").strip()
    return "" if own_port else environ.get(PLATFORM_PORT, "").strip()


def _is_port(text: str) -> bool:
    return bool(re.fullmatch("[0-9]{1,5}", text)) and int(text) in range(65_536)


def _first_error(error: ValidationError, variables: Mapping[str, str]) -> str:
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    message = first["msg"].removeprefix("Value error, ")
    return f"{variables[str(first['loc'][0])]}: {message}" if first["loc"] else message


@functools.cache
def settings() -> Settings:
    """Return the settings of this process."""
    return load_rejecting_unknown(os.environ)
