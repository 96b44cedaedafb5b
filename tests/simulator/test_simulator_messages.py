import json

from hypothesis import given, settings
from hypothesis import strategies as st

from simulator import quiltt_records
from simulator.quiltt_records import Account
from simulator.scenarios import ACCOUNT_ID

ACCOUNT = "acct_12Hz9Dz7vEAuljYvhmPcvM9"
AT = 1737728062.9  # 2025-01-24T14:14:22.9Z

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["events", "record", "id", "source", "accountId"]), inner, max_size=4)
    ),
    max_leaves=20,
)


def test_ids_are_opaque_and_unique() -> None:
    """Ten thousand new ids differ, and all match the id pattern."""
    ids = {quiltt_records.new_id("bal") for _ in range(10_000)}
    assert len(ids) == 10_000
    assert all(ACCOUNT_ID.fullmatch(found) for found in ids)


def test_times_are_whole_seconds_in_utc() -> None:
    """Fractions are truncated, not rounded, because the provider's times have none."""
    assert quiltt_records.timestamp_text(AT) == "2025-01-24T14:14:22Z"


def test_balance_has_all_fields_and_its_offset() -> None:
    """All seven fields are present, null or not, and the offset moves `at`."""
    balance = quiltt_records.balance_record("bal_1", ACCOUNT, Account(available=None, at_offset_s=-60), "REFRESH", AT)
    assert balance == {
        "id": "bal_1",
        "accountId": ACCOUNT,
        "at": "2025-01-24T14:13:22Z",
        "source": "REFRESH",
        "available": None,
        "current": 512.34,
        "limit": None,
    }


def test_account_has_one_profile() -> None:
    """Two events of one account name the same profile and have different ids."""
    one, two = (quiltt_records.event_record("balance.created", {}, ACCOUNT, AT) for _ in range(2))
    assert one["profile"] == two["profile"]
    assert one["id"] != two["id"]


def test_delivery_lists_each_event_type_once() -> None:
    """The list of types has the order of the events and no duplicates. The environment contains the mode."""
    events = [
        quiltt_records.event_record(kind, {}, ACCOUNT, AT)
        for kind in ("balance.created", "account.verified", "balance.created")
    ]
    sent = json.loads(quiltt_records.delivery_body(events, "SANDBOX"))
    assert sent["eventTypes"] == ["balance.created", "account.verified"]
    assert sent["environment"]["mode"] == "SANDBOX"
    assert sent["events"] == events


def test_only_server_errors_carry_an_error_id() -> None:
    """Every error has a message and an instruction. 5xx errors also have an id."""
    keys = {status: quiltt_records.rest_error_body(status).keys() for status in (400, 401, 403, 404, 429, 500)}
    assert keys.pop(500) == {"message", "instruction", "errorId"}
    assert all(found == {"message", "instruction"} for found in keys.values())


def test_ids_of_a_delivery_are_read_from_its_body() -> None:
    """Events, balances and accounts are listed once each, in order. Other records do not count as balances."""
    record = quiltt_records.balance_record("bal_1", ACCOUNT, Account(), "REFRESH", AT)
    event = quiltt_records.event_record("balance.created", record, ACCOUNT, AT)
    other = quiltt_records.event_record("connection.disconnected", {"id": "conn_1"}, ACCOUNT, AT)
    found = quiltt_records.ids_in_body(quiltt_records.delivery_body([event, other, event], "TEST"))
    assert found == quiltt_records.BodyIds(events=(event["id"], other["id"]), balances=("bal_1",), accounts=(ACCOUNT,))


@settings(database=None, deadline=None)
@given(
    st.binary() | st.one_of(json_values, st.fixed_dictionaries({"events": json_values})).map(quiltt_records.encode_json)
)
def test_reading_ids_accepts_any_body(body: bytes) -> None:
    """Reading ids never raises an exception."""
    quiltt_records.ids_in_body(body)
