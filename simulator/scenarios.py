"""Scenarios: what happens when the balance of an account is refreshed. Pure functions.

The account id selects the scenario: the lower-case letters after `acct_` are its name, so `acct_slow0001` is `slow`.
All other accounts are `prompt`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from random import Random
from types import MappingProxyType

ACCOUNT_ID = re.compile(r"[a-z]{1,8}_[0-9A-Za-z]{1,64}")
_SCENARIO_PATTERN = re.compile(r"acct_([a-z]+)")


class ResponseKind(Enum):
    """How the HTTP request of the call ends."""

    STATUS = auto()
    """A response with a status."""
    DISCONNECT = auto()
    """The connection closes without a response."""
    HANG = auto()
    """The request stays open until the client disconnects."""


class WebhookKind(Enum):
    """Deliveries that are sent to the webhook."""

    EVENT = auto()
    NOTHING = auto()
    TWICE = auto()
    """The event twice in one delivery, and once in a second delivery."""
    FORGED = auto()
    """Signed with a wrong secret."""
    STALE = auto()
    """Signed correctly, ten minutes ago."""
    BATCH = auto()
    """The event among foreign, unknown and malformed events."""


class EventDelay(Enum):
    """Delay between the call and its event. The seconds are settings (`Defaults`)."""

    PROMPT = auto()
    SLOW = auto()
    LATE = auto()
    NONE = auto()
    MIXED = auto()


@dataclass(frozen=True, slots=True)
class Scenario:
    """One scenario."""

    name: str
    summary: str
    status: int = 202
    response_kind: ResponseKind = ResponseKind.STATUS
    webhooks: WebhookKind = WebhookKind.EVENT
    event_delay: EventDelay = EventDelay.PROMPT
    webhook_before_response: bool = False
    rate_limits_first_call: bool = False
    shown_in_graphql: bool = True
    """Whether GraphQL shows the new balance."""
    account: Mapping[str, object] = field(default_factory=dict)
    """Fields of `Account` that differ from its defaults."""


_SCENARIO_ROWS = (
    Scenario("prompt", "202, then the event after a short delay; all accounts without another scenario"),
    Scenario("slow", "202, the event after seconds", event_delay=EventDelay.SLOW),
    Scenario("late", "202, the event after longer than a short deadline", event_delay=EventDelay.LATE),
    Scenario("never", "202, no event and no new balance", webhooks=WebhookKind.NOTHING, shown_in_graphql=False),
    Scenario("unsent", "202, a new balance that only GraphQL shows: its webhook is lost", webhooks=WebhookKind.NOTHING),
    Scenario("twice", "202, the event twice in one delivery and again in a second one", webhooks=WebhookKind.TWICE),
    Scenario(
        "early",
        "the webhook is delivered before the 202 is sent",
        event_delay=EventDelay.NONE,
        webhook_before_response=True,
    ),
    Scenario(
        "lost",
        "accepted: the event is sent, but the connection closes without a response",
        response_kind=ResponseKind.DISCONNECT,
    ),
    Scenario(
        "silent",
        "accepted: no response, the request stays open; no event",
        response_kind=ResponseKind.HANG,
        webhooks=WebhookKind.NOTHING,
        shown_in_graphql=False,
    ),
    Scenario(
        "forged",
        "202, then only deliveries with a wrong signature",
        webhooks=WebhookKind.FORGED,
        shown_in_graphql=False,
    ),
    Scenario(
        "stale", "202, then only deliveries signed 10 minutes ago", webhooks=WebhookKind.STALE, shown_in_graphql=False
    ),
    Scenario(
        "batch",
        "202, one delivery: a foreign SYNC, an unknown type, two malformed, the valid event, a foreign REFRESH",
        webhooks=WebhookKind.BATCH,
    ),
    Scenario("nullavail", "202, event with available null", account={"available": None}),
    Scenario("poor", "202, event with available 1.00", account={"available": 1.00, "current": 1.00}),
    Scenario(
        "credit",
        "202, event with available 4000.00 of a credit line, whose kind only GraphQL shows",
        account={"kind": "CREDIT", "available": 4000.00, "current": 1000.00, "limit": 5000.00},
    ),
    Scenario(
        "throttled", "429 with Ratelimit-Reset, the next call 202 and the event, and so on", rate_limits_first_call=True
    ),
    Scenario("badreq", "400: account kind not supported", status=400, account={"kind": "LOAN"}),
    Scenario("unauth", "401 for every key", status=401),
    Scenario("inactive", "403: connection in error", status=403, account={"connection_status": "ERROR_REPAIRABLE"}),
    Scenario("gone", "404, and null in GraphQL", status=404),
    Scenario("error", "500 always, never accepted", status=500),
    Scenario("mix", "drawn per call: 0-2 s, sometimes twice, early, lost or throttled; never a permanent failure"),
)

SCENARIOS: Mapping[str, Scenario] = MappingProxyType({row.name: row for row in _SCENARIO_ROWS})

_MIX_WEIGHTS = {"prompt": 60, "twice": 10, "early": 10, "lost": 10, "throttled": 10}


def scenario_of(account_id: str) -> Scenario:
    """Return the scenario that an account id selects."""
    named = _SCENARIO_PATTERN.match(account_id)
    return SCENARIOS.get(named[1], SCENARIOS["prompt"]) if named else SCENARIOS["prompt"]


def draw_scenario(scenario: Scenario, rng: Random) -> tuple[Scenario, EventDelay]:
    """Return the effective scenario of one call and its event delay. Only `mix` differs from the effective scenario."""
    if scenario.name != "mix":
        return scenario, scenario.event_delay
    effective = SCENARIOS[rng.choices(list(_MIX_WEIGHTS), list(_MIX_WEIGHTS.values()))[0]]
    return effective, effective.event_delay if effective.webhook_before_response else EventDelay.MIXED


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """Settings that all accounts share. `PUT /control/defaults` changes them."""

    prompt_s: float = 0.3
    """Mean of the delay, which is drawn between 0.5 and 1.5 times this."""
    slow_s: float = 3.0
    late_s: float = 6.0
    retry_base_s: float = 0.5
    """Pause before the first retry. It doubles with each attempt."""
    keep_signature: bool = False
    """Whether a retry carries the timestamp and signature of the first attempt."""
    rate_limit_per_s: int = 1000
    """Calls above this get a 429."""

    def delay_s(self, event_delay: EventDelay, rng: Random) -> float:
        """Return the seconds from the call to its event."""
        match event_delay:
            case EventDelay.PROMPT:
                return rng.uniform(0.5, 1.5) * self.prompt_s
            case EventDelay.SLOW:
                return self.slow_s
            case EventDelay.LATE:
                return self.late_s
            case EventDelay.MIXED:
                return rng.uniform(0.0, 2.0)
            case EventDelay.NONE:
                return 0.0


def scenario_table() -> str:
    """Return a list of the scenarios, one per line."""
    return "\n".join(f"{row.name:<10} {row.summary}" for row in _SCENARIO_ROWS)
