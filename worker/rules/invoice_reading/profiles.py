"""Profiles: the format of an invoice as TOML."""

import json
import tomllib
from typing import Any

from pydantic import ValidationError

from worker.rules.invoice_format import InvoiceFormat
from worker.rules.invoice_lines import InvoiceError


def profile_text(invoice_format: InvoiceFormat) -> str:
    """Return a format as TOML."""
    values = invoice_format.model_dump(mode="json", exclude_none=True)
    columns = values.pop("columns")
    lines = [_toml_line(name, value) for name, value in values.items()]
    return "\n".join([*lines, "", "[columns]", *(_toml_line(name, value) for name, value in columns.items()), ""])


def _toml_line(name: str, value: Any) -> str:
    """Return one key. A JSON string without control characters beyond ASCII is a TOML string."""
    return f"{name} = {json.dumps(value, ensure_ascii=False)}"


def parse_profile(text: str) -> InvoiceFormat:
    """Return the format of a profile.

    Raises:
        InvoiceError: it is not TOML, or not a profile.
    """
    try:
        return InvoiceFormat.model_validate(tomllib.loads(text))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise InvoiceError(f"the profile is not TOML: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise InvoiceError(f"the profile's {name or 'content'} is wrong: {first['msg']}; save it again") from None
