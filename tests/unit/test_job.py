"""What a job may say: each rule that is broken is named, with its field, and nothing of the value is shown."""

import json
import re
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.errors import InvalidJob
from worker.rules.decimals import MINOR_UNIT_DIGITS, amount_with_currency_text
from worker.rules.job import MAX_METADATA_BYTES, Buffer, Job, parse_job

JOB = {"payment_id": "pay_1", "account_id": "acct_12Hz9Dz7vEAuljYvhmPcvM9"}
SECRET = "s3cr3t"


def parse(**changes: Any) -> Job:
    """A job with these changes; None takes a field away."""
    arguments = {name: value for name, value in {**JOB, **changes}.items() if value is not None}
    return parse_job(arguments, currency="USD")


def _complaint(**changes: Any) -> str | None:
    """What is said of a job with these changes; None if it is taken."""
    try:
        parse(**changes)
    except InvalidJob as refusal:
        return f"{refusal} {refusal.__cause__}".removesuffix(" None")
    return None


def test_the_smallest_job_has_the_documented_defaults() -> None:
    """Two fields are enough."""
    job = parse()
    assert (job.currency, job.timeout_s, job.max_balance_age_s, job.effective_funds_check) == (
        "USD",
        120,
        30,
        "disabled",
    )
    assert (job.amount, job.include_overdraft, job.metadata) == (None, False, {})
    assert (job.buffer.multiplier, job.buffer.fixed) == (Decimal(1), Decimal(0))


def test_an_amount_asks_for_a_check_unless_the_job_says_otherwise() -> None:
    """`required` by default."""
    assert parse(amount="1.00").effective_funds_check == "required"
    assert parse(amount="1.00", funds_check="enabled").effective_funds_check == "enabled"
    assert parse(amount="1.00", funds_check="disabled").effective_funds_check == "disabled"


def test_the_age_counts_back_from_the_request() -> None:
    """Zero means the time of the request."""
    now = datetime(2026, 1, 1, tzinfo=UTC)
    assert parse(max_balance_age_s=0).min_balance_at(now) == now
    assert parse(max_balance_age_s=90).min_balance_at(now) == now - timedelta(seconds=90)


def nested(levels: int) -> dict[str, Any]:
    """An object with lists in one another on so many levels in all."""
    value: Any = []
    for _ in range(levels - 2):
        value = [value]
    return {"x": value}


BAD = [
    # field, value, rule in the message
    ("payment_id", "", "must be 1 to 128 printable ASCII characters without spaces"),
    ("payment_id", "x" * 129, "must be 1 to 128 printable ASCII characters without spaces"),
    ("payment_id", "with space", "must be 1 to 128 printable ASCII characters without spaces"),
    ("payment_id", "tab\t", "must be 1 to 128 printable ASCII characters without spaces"),
    ("payment_id", "line\n", "must be 1 to 128 printable ASCII characters without spaces"),
    ("payment_id", "naïve", "must be 1 to 128 printable ASCII characters without spaces"),
    ("payment_id", "\x00", "must be 1 to 128 printable ASCII characters without spaces"),
    ("payment_id", 7, "must be 1 to 128 printable ASCII characters without spaces"),
    ("account_id", "12Hz9Dz7", 'must be a Quiltt account id, such as "acct_12Hz9Dz7"'),
    ("account_id", "acct_", 'must be a Quiltt account id, such as "acct_12Hz9Dz7"'),
    ("account_id", "acct_1/../x", 'must be a Quiltt account id, such as "acct_12Hz9Dz7"'),
    ("account_id", "acct_1\n", 'must be a Quiltt account id, such as "acct_12Hz9Dz7"'),
    ("account_id", "acct_" + "1" * 65, 'must be a Quiltt account id, such as "acct_12Hz9Dz7"'),
    ("account_id", "ACCT_1", 'must be a Quiltt account id, such as "acct_12Hz9Dz7"'),
    ("account_id", {"id": "acct_1"}, 'must be a Quiltt account id, such as "acct_12Hz9Dz7"'),
    ("profile_id", "p 1", 'must be a Quiltt profile id, such as "p_12Hz9Dz7"'),
    ("connection_id", "conn_{}", 'must be a Quiltt connection id, such as "conn_12Hz9Dz7"'),
    ("amount", "0", 'must be a decimal in a string, greater than 0 and with at most 38 digits, such as "25.00"'),
    ("amount", "-1.00", 'must be a decimal in a string, greater than 0 and with at most 38 digits, such as "25.00"'),
    ("amount", "25.001", "must have at most 2 decimal places in USD"),
    ("amount", "1e-9", 'must be a decimal in a string, greater than 0 and with at most 38 digits, such as "25.00"'),
    ("amount", 25.0, 'must be a decimal in a string, greater than 0 and with at most 38 digits, such as "25.00"'),
    ("amount", 25, 'must be a decimal in a string, greater than 0 and with at most 38 digits, such as "25.00"'),
    ("amount", True, 'must be a decimal in a string, greater than 0 and with at most 38 digits, such as "25.00"'),
    ("amount", "a lot", 'must be a decimal in a string, greater than 0 and with at most 38 digits, such as "25.00"'),
    ("amount", "NaN", 'must be a decimal in a string, greater than 0 and with at most 38 digits, such as "25.00"'),
    ("amount", "Infinity", 'must be a decimal in a string, greater than 0 and with at most 38 digits, such as "25.00"'),
    ("amount", "1" * 39, 'must be a decimal in a string, greater than 0 and with at most 38 digits, such as "25.00"'),
    ("amount", "1e99999", 'must be a decimal in a string, greater than 0 and with at most 38 digits, such as "25.00"'),
    ("amount", "1e-99999", 'must be a decimal in a string, greater than 0 and with at most 38 digits, such as "25.00"'),
    ("amount", " 25.00", 'must be a decimal in a string, greater than 0 and with at most 38 digits, such as "25.00"'),
    ("amount", "25.00\n", 'must be a decimal in a string, greater than 0 and with at most 38 digits, such as "25.00"'),
    ("amount", "1_000", 'must be a decimal in a string, greater than 0 and with at most 38 digits, such as "25.00"'),
    ("amount", "２５", 'must be a decimal in a string, greater than 0 and with at most 38 digits, such as "25.00"'),
    ("currency", "usd", 'must be three capital letters, such as "USD"'),
    ("currency", "DOLLAR", 'must be three capital letters, such as "USD"'),
    ("timeout_s", 0, "must be a whole number of seconds from 1 to 3600"),
    ("timeout_s", 3601, "must be a whole number of seconds from 1 to 3600"),
    ("timeout_s", 1.5, "must be a whole number of seconds from 1 to 3600"),
    ("timeout_s", "120", "must be a whole number of seconds from 1 to 3600"),
    ("timeout_s", True, "must be a whole number of seconds from 1 to 3600"),
    ("max_balance_age_s", -1, "must be a whole number of seconds from 0 to 86400"),
    ("max_balance_age_s", 86_401, "must be a whole number of seconds from 0 to 86400"),
    ("max_balance_age_s", "30", "must be a whole number of seconds from 0 to 86400"),
    ("funds_check", "maybe", 'must be "required", "enabled" or "disabled"'),
    (
        "buffer.multiplier",
        {"multiplier": "0.9"},
        'must be a decimal in a string, from "1" to "5" and with at most 38 digits',
    ),
    (
        "buffer.multiplier",
        {"multiplier": "5.01"},
        'must be a decimal in a string, from "1" to "5" and with at most 38 digits',
    ),
    (
        "buffer.multiplier",
        {"multiplier": 1.5},
        'must be a decimal in a string, from "1" to "5" and with at most 38 digits',
    ),
    (
        "buffer.fixed",
        {"fixed": "-0.01"},
        'must be a decimal in a string, "0" or more and with at most 38 digits, such as "2.00"',
    ),
    ("buffer.colour", {"colour": "red"}, "is not a field of the buffer"),
    ("include_overdraft", "yes", "must be true or false"),
    ("include_overdraft", 1, "must be true or false"),
    ("metadata", [1], "must be a JSON object"),
    (
        "metadata",
        {"x": "y" * MAX_METADATA_BYTES},
        f"must not have more than {MAX_METADATA_BYTES} bytes of JSON, but has {MAX_METADATA_BYTES + 9}",
    ),
    ("metadata", nested(65), "must not have more than 64 levels of lists and objects"),
    ("metadata", nested(500), "must not have more than 64 levels of lists and objects"),
    ("metadata", {"x": float("nan")}, "must be a JSON object"),
    ("metadata", {"x": object()}, "must be a JSON object"),
    ("amout", "25.00", 'is not a field of a job (did you mean "amount"?)'),
]


@pytest.mark.parametrize(("field", "value", "rule"), BAD, ids=lambda value: str(value)[:24])
def test_a_rule_that_is_broken_is_named_with_its_field(field: str, value: Any, rule: str) -> None:
    """So that who sent the job can mend it."""
    with pytest.raises(InvalidJob) as refusal:
        parse(**{field.partition(".")[0]: value})
    assert str(refusal.value) == f"{field}: {rule}"


@pytest.mark.parametrize("field", ["payment_id", "account_id"])
def test_a_field_that_is_needed_is_asked_for(field: str) -> None:
    """By name."""
    with pytest.raises(InvalidJob, match=f"{field}: is missing"):
        parse(**{field: None})


def test_all_complaints_come_at_once() -> None:
    """No job is sent back twice for two mistakes."""
    with pytest.raises(InvalidJob) as refusal:
        parse(amount="-1", timeout_s=0, colour="red")
    for field in ("amount", "timeout_s", "colour"):
        assert f"{field}: " in str(refusal.value)


def test_a_check_needs_an_amount() -> None:
    """Else there is nothing to check."""
    for check in ("required", "enabled"):
        with pytest.raises(InvalidJob, match="amount: is missing, but a funds check needs it"):
            parse(funds_check=check)
    assert parse(funds_check="disabled").amount is None


def test_a_foreign_currency_is_refused() -> None:
    """Quiltt names none with its balances, so there is one for all accounts."""
    with pytest.raises(InvalidJob, match="currency: is EUR, but the currency of the accounts is USD"):
        parse_job({**JOB, "currency": "EUR"}, currency="USD")
    assert parse_job({**JOB, "currency": "EUR"}, currency="EUR").currency == "EUR"


@pytest.mark.parametrize(("currency", "places"), [("USD", 2), ("EUR", 2), *MINOR_UNIT_DIGITS.items()])
def test_an_amount_has_as_many_places_as_its_currency(currency: str, places: int) -> None:
    """And not one more; zeros at the end are none."""
    right = "7." + "0" * places + "00" if places == 0 else "7." + "1" * places + "00"
    assert parse_job({**JOB, "amount": right, "currency": currency}, currency=currency).amount == Decimal(right)
    allowed = f"at most {places} decimal places" if places else "no decimal places"
    with pytest.raises(InvalidJob, match=f"amount: must have {allowed} in {currency}"):
        parse_job({**JOB, "amount": "7." + "1" * (places + 1), "currency": currency}, currency=currency)


@given(
    amount=st.decimals(min_value=Decimal("0.01"), max_value=Decimal("1e34"), places=2, allow_nan=False)
    | st.integers(0, 37).map(lambda exponent: Decimal(f"1e{exponent}"))
)
def test_every_amount_of_cents_is_taken_as_it_is(amount: Decimal) -> None:
    """Large ones too: no digit is lost, and none is too many."""
    assert parse(amount=format(amount, "f")).amount == amount


@given(text=st.text(max_size=60) | st.from_regex(r"-?[0-9]{0,40}(\.[0-9]{0,40})?(e-?[0-9]{1,6})?", fullmatch=True))
def test_any_text_is_an_amount_or_an_invalid_job(text: str) -> None:
    """Nothing else is ever raised."""
    error_text = _complaint(amount=text)
    assert error_text is None or "amount: " in error_text


@pytest.mark.parametrize("field", [*Job.model_fields, "colour"])
def test_no_complaint_shows_what_was_sent(field: str) -> None:
    """It may be private, and errors end up in logs and results."""
    for value in (f" {SECRET}", {SECRET: {SECRET: SECRET}}, [SECRET], SECRET * 2000):
        error_text = _complaint(**{field: value}) or ""
        assert SECRET not in error_text.replace(f"buffer.{SECRET}: ", "")


WRONG_VALUES: list[Any] = [
    None, "", "x y", "\x00", "?" * 5000, "-1", "1e400", "NaN", -1, 0, 10**40, 1.5, float("nan"), True, b"bytes",
    [], [1], {}, {"x": 1}, {1: 2}, {"multiplier": None}, {"fixed": [1], "multiplier": "9"}, {"mutliplier": "1"},
    (1, 2), {1, 2}, object(), Decimal("NaN"), datetime(2026, 1, 1, tzinfo=UTC), "\ud800",
]  # fmt: skip
FIELDS = [*Job.model_fields, *(f"buffer.{name}" for name in Buffer.model_fields)]
FOREIGN_WORDS = re.compile(
    r"\^|\$|\\|\[|pydantic|pattern|regex|input|dict|integer|boolean|[Ss]tring should|[Ff]ield required|permitted|Extra"
    r"|instance|validator|Value error|literal|finite|NoneType|unhashable|None\b"
)


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("value", WRONG_VALUES, ids=lambda value: type(value).__name__)
def test_every_message_about_a_wrong_value_is_in_plain_words(field: str, value: Any) -> None:
    """No text of pydantic, no regular expression and no name of a Python type reaches the payments service."""
    name, _, inner = field.partition(".")
    arguments = {**JOB, name: {inner: value} if inner else value}
    try:
        parse_job(arguments, currency="USD")
    except InvalidJob as error:
        for problem in str(error).split("; "):
            named, _, rule = problem.partition(": ")
            assert named.split(".")[0] == name
            assert re.match(r"must |is ", rule), problem
            assert not FOREIGN_WORDS.search(problem), problem


@pytest.mark.parametrize("absent", list(JOB))
def test_a_missing_field_is_named(absent: str) -> None:
    with pytest.raises(InvalidJob, match=rf"^{absent}: is missing$"):
        parse(**{absent: None})


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("acount_id", 'acount_id: is not a field of a job (did you mean "account_id"?)'),
        ("fund_check", 'fund_check: is not a field of a job (did you mean "funds_check"?)'),
        ("colour", "colour: is not a field of a job"),
        ("colour" * 100, f"{('colour' * 100)[:64]}: is not a field of a job"),
    ],
)
def test_an_unknown_field_is_named_with_the_field_that_is_meant(field: str, message: str) -> None:
    with pytest.raises(InvalidJob) as error:
        parse(**{field: 1})
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("amount", "currency", "text"),
    [
        ("10", "USD", "10.00 USD"),
        ("-0.5", "USD", "-0.50 USD"),
        ("27.500", "USD", "27.50 USD"),
        ("0.1234500", "USD", "0.12345 USD"),
        ("10", "JPY", "10 JPY"),
        ("10.00", "JPY", "10 JPY"),
        ("10.5", "JPY", "10.5 JPY"),
        ("1e2", "BHD", "100.000 BHD"),
    ],
)
def test_an_amount_in_a_text_has_the_decimals_of_its_currency(amount: str, currency: str, text: str) -> None:
    assert amount_with_currency_text(Decimal(amount), currency) == text


def test_a_job_survives_the_way_through_the_ledger() -> None:
    """Its JSON, without defaults, is the same job again."""
    assert parse(metadata=nested(64)).model_dump(mode="json")["metadata"] == nested(64)
    job = parse(amount="25.10", buffer={"multiplier": "1.50", "fixed": "0.1"}, metadata={"a": [1, None, {"b": "ü"}]})
    stored = json.loads(json.dumps(job.model_dump(mode="json", exclude_defaults=True)))
    assert Job.model_validate(stored) == job
    assert stored["amount"] == "25.10"
    assert "timeout_s" not in stored
