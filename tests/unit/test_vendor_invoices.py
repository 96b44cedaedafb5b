"""Each file of tests/invoices/ is read right, or rejected with the line, the reason and the option that helps."""

import tomllib
from decimal import Decimal
from typing import Any

import pytest

from demo.processes import ROOT
from tests.support.invoice_files import read
from worker.rules.invoice_format import DateStyle, DecimalStyle
from worker.rules.invoice_lines import InvoiceContent, InvoiceError
from worker.rules.invoice_reading import Role, options_of_profile, parse_profile, profile_text

FOLDER = ROOT / "tests" / "invoices"
EXPECTED: dict[str, dict[str, Any]] = tomllib.loads((FOLDER / "expected.toml").read_text())
ACCOUNTS = ["acct_a", "acct_a", "acct_b", "acct_c"]
DAYS = [3, 12, 13, 25]
OPTION_TYPES = {"date_style": DateStyle, "decimal_style": DecimalStyle}


def read_file(file: str, **options: Any) -> InvoiceContent:
    typed = {
        option: OPTION_TYPES[option](value) if option in OPTION_TYPES else value for option, value in options.items()
    }
    typed["columns"] = {Role(role): column for role, column in options.get("columns", {}).items()}
    return read((FOLDER / file).read_bytes(), currency=EXPECTED[file].get("currency", "USD"), **typed)


def test_each_file_has_an_expectation() -> None:
    files = {file.name for file in FOLDER.iterdir()} - {"expected.toml"}
    assert files == set(EXPECTED)
    assert len(files) >= 40


@pytest.mark.parametrize("name", [name for name, file in EXPECTED.items() if "rejected" in file])
def test_file_is_rejected_with_line_reason_and_option(name: str) -> None:
    with pytest.raises(InvoiceError) as raised:
        read_file(name)
    assert str(raised.value).startswith(EXPECTED[name]["rejected"])
    assert str(raised.value).isprintable()


@pytest.mark.parametrize(
    "name", [name for name, file in EXPECTED.items() if "rejected" not in file or "options" in file]
)
def test_file_is_read_right_and_again_by_its_profile(name: str) -> None:
    expected = EXPECTED[name]
    content = read_file(name, **expected.get("options", {}))
    charges = content.lines or content.aggregated_lines
    assert sum((line.amount for line in charges), Decimal(0)) == Decimal(expected.get("amount", "0.40"))
    assert (len(content.credits), len(content.totals)) == (expected.get("credits", 0), expected.get("totals", 0))
    assert content.level == expected.get("level")
    if content.level is None:
        found = [(line.account_id, line.since.day) for line in content.lines]
        assert found == list(zip(ACCOUNTS, expected.get("days", DAYS), strict=True))
    else:
        assert sum(line.count for line in content.aggregated_lines if line.amount) == 4
    profile = options_of_profile(parse_profile(profile_text(content.format)))
    confirmed = {option: value for option, value in vars(profile).items() if value is not None}
    again = read_file(name, **{**expected.get("options", {}), **confirmed})
    assert (again.lines, again.aggregated_lines) == (content.lines, content.aggregated_lines)
