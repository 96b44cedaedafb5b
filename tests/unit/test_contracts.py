"""The published JSON schemas are current, and jobs and outcomes conform to them."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from jsonschema import Draft202012Validator, FormatChecker
from jsonschema.exceptions import ValidationError

from tests.contracts import FOLDER, contracts
from worker.errors import FailureReason, InvalidJob
from worker.rules.job import Job, parse_job

JOB = {"payment_id": "pay_1", "account_id": "acct_1"}


def _validator(name: str) -> Callable[[Any], None]:
    schema = json.loads((FOLDER / f"{name}.schema.json").read_text())
    Draft202012Validator.check_schema(schema)
    validate: Callable[[Any], None] = Draft202012Validator(schema, format_checker=FormatChecker()).validate
    return validate


def test_published_schemas_match_the_models() -> None:
    """To fix a failure, run `python -m tests.contracts` and add a line to the change log."""
    published = {path.name: path.read_text() for path in FOLDER.glob("*.json")}
    assert published == contracts()


def test_failure_schema_lists_every_reason() -> None:
    """The payments service branches on the reasons."""
    failure = json.loads((FOLDER / "failure.schema.json").read_text())
    assert failure["$defs"]["FailureReason"]["enum"] == [reason.value for reason in FailureReason]
    _validator("failure")({"reason": "timeout", "detail": "no balance arrived within 120 s"})
    with pytest.raises(ValidationError):
        _validator("failure")({"reason": "bad luck", "detail": ""})


VALID: list[dict[str, Any]] = [
    {},
    {"amount": "25.00", "currency": "USD", "funds_check": "enabled"},
    {"timeout_s": 1, "max_balance_age_s": 0, "hold_s": 0, "metadata": {"a": [1, {"b": None}]}},
    {"amount": "999999999999999.99", "include_overdraft": True, "hold_s": 864_000},
    {"amount": "1", "buffer": {"multiplier": "1.5", "fixed": "2.00"}, "profile_id": "p_1", "connection_id": "conn_1"},
]
INVALID: list[dict[str, Any]] = [
    {"payment_id": ""},
    {"account_id": "nonsense"},
    {"amount": 25.0},
    {"amount": "1e3"},
    {"amount": " 25.00"},
    {"amount": "２５"},
    {"amount": "1_000"},
    {"amount": "NaN"},
    {"timeout_s": 0},
    {"timeout_s": "120"},
    {"max_balance_age_s": 86_401},
    {"hold_s": 864_001},
    {"hold_s": "60"},
    {"funds_check": "maybe"},
    {"buffer": {"colour": "red"}},
    {"colour": "red"},
]


@pytest.mark.parametrize("changes", VALID)
def test_parser_accepts_a_job_that_the_schema_allows(changes: dict[str, Any]) -> None:
    """The sender can validate a job before it sends it."""
    _validator("job")({**JOB, **changes})
    assert isinstance(parse_job({**JOB, **changes}, required_currency="USD"), Job)


@pytest.mark.parametrize("changes", INVALID)
def test_parser_rejects_a_job_that_the_schema_forbids(changes: dict[str, Any]) -> None:
    """The sender can find the mistake before it sends the job."""
    with pytest.raises(ValidationError):
        _validator("job")({**JOB, **changes})
    with pytest.raises(InvalidJob):
        parse_job({**JOB, **changes}, required_currency="USD")
