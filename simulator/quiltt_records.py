"""JSON records of the provider: ids, balances, events, deliveries, errors. Pure functions, except for random ids."""

import json
import random
import string
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

Json = dict[str, Any]

_BASE62 = string.digits + string.ascii_letters
_id_generator = random.Random()
"""It has no seed: ids must be unique across restarts of a simulator with the same seed."""


def new_id(prefix: str) -> str:
    """Return a new opaque id such as `bal_12vXOdjpsZIgB3Ae80Y7Pl`."""
    return f"{prefix}_{''.join(_id_generator.choices(_BASE62, k=22))}"


def replace_id_prefix(prefix: str, account_id: str) -> str:
    """Return the id of the account's related record, such as its connection. The result is deterministic."""
    return f"{prefix}_{account_id.partition('_')[2]}"


def timestamp_text(at: float) -> str:
    """Format Unix seconds as the provider does: UTC, whole seconds."""
    return datetime.fromtimestamp(int(at), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """Account as shown by GraphQL and events, and two settings of its events. Amounts are JSON numbers or null."""

    delay_s: float | None = None
    """Delay between the call and its event. None: the delay of the scenario."""
    at_offset_s: float = 0.0
    """Seconds that are added to the balance's `at`."""
    available: float | None = 500.00
    current: float | None = 512.34
    limit: float | None = None
    currency_code: str = "USD"
    kind: str = "DEPOSITORY"
    state: str = "OPEN"
    connection_status: str = "SYNCED"


def balance_record(balance_id: str, account_id: str, account: Account, source: str, at: float) -> Json:
    """Return a Balance record created at `at` (Unix seconds)."""
    return {
        "id": balance_id,
        "accountId": account_id,
        "at": timestamp_text(at + account.at_offset_s),
        "source": source,
        "available": account.available,
        "current": account.current,
        "limit": account.limit,
    }


def event_record(event_type: str, record: Json, account_id: str, at: float) -> Json:
    """Return one event about a record of the account's profile."""
    profile_id = replace_id_prefix("p", account_id)
    return {
        "id": new_id("evt"),
        "at": timestamp_text(at),
        "type": event_type,
        "profile": {"id": profile_id, "uuid": str(uuid.uuid5(uuid.NAMESPACE_OID, profile_id)), "metadata": None},
        "record": record,
        "metadata": {},
    }


def mixed_events(valid_event: Json, account_id: str, at: float) -> list[Json]:
    """Return the valid event among events that are foreign, of an unknown type, or malformed."""
    foreign_account, unknown_account = new_id("acct"), new_id("acct")
    synced = balance_record(new_id("bal"), foreign_account, Account(), "SYNC", at)
    without_account = balance_record(new_id("bal"), account_id, Account(), "REFRESH", at)
    del without_account["accountId"]
    malformed = balance_record(new_id("bal"), account_id, Account(), "REFRESH", at) | {"available": "abc"}
    foreign_refresh = balance_record(new_id("bal"), unknown_account, Account(), "REFRESH", at)
    return [
        event_record("balance.created", synced, foreign_account, at),
        event_record("account.pondered", {"id": account_id, "mood": "new"}, account_id, at),
        event_record("balance.created", without_account, account_id, at),
        event_record("balance.created", malformed, account_id, at),
        valid_event,
        event_record("balance.created", foreign_refresh, unknown_account, at),
    ]


def environment_record(mode: str) -> Json:
    """Return the environment of all API keys and webhooks of this simulator."""
    return {"id": "env_simulator", "name": "Simulator", "mode": mode, "metadata": None}


def delivery_body(events: Sequence[Json], mode: str) -> bytes:
    """Return the body of one delivery."""
    event_types = list(dict.fromkeys(item["type"] for item in events))
    return encode_json({"environment": environment_record(mode), "eventTypes": event_types, "events": list(events)})


def encode_json(value: object) -> bytes:
    """Encode as compact JSON. The same bytes are signed and sent."""
    return json.dumps(value, separators=(",", ":")).encode()


_REST_ERRORS: Mapping[int, tuple[str, str]] = {
    400: ("Account kind not supported by provider", "Refresh accounts of a supported kind only."),
    401: ("Unauthorized", "Check the API key."),
    403: ("Connection disconnected or in an error state", "Ask the user to reconnect."),
    404: ("Account not found", "Check the account id."),
    429: ("Provider rate limit exceeded", "Try again later."),
    500: ("Internal server error", "Contact support with the error id."),
}


def rest_error_body(status: int) -> Json:
    """Return the body of an error response. Only 5xx responses have an error id."""
    message, instruction = _REST_ERRORS[status]
    error = {"message": message, "instruction": instruction}
    return error | {"errorId": new_id("err")} if status >= 500 else error


@dataclass(frozen=True, slots=True, kw_only=True)
class BodyIds:
    """Ids of the events, balances and accounts in a delivery."""

    events: tuple[str, ...] = ()
    balances: tuple[str, ...] = ()
    accounts: tuple[str, ...] = ()


def ids_in_body(body: bytes) -> BodyIds:
    """Return the ids in a delivery's body, in order and without duplicates; none if the body is not valid."""
    try:
        content = json.loads(body)
    except ValueError:
        return BodyIds()
    events = content.get("events") if isinstance(content, dict) else None
    events = [item for item in events if isinstance(item, dict)] if isinstance(events, list) else []
    records = [item["record"] for item in events if isinstance(item.get("record"), dict)]
    return BodyIds(
        events=_unique_strings(item.get("id") for item in events),
        balances=_unique_strings(record.get("id") for record in records if "source" in record),
        accounts=_unique_strings(record.get("accountId") for record in records),
    )


def _unique_strings(values: Iterable[object]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(value for value in values if isinstance(value, str)))
