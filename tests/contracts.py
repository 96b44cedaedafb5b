"""Write the JSON Schemas and the OpenAPI document of `docs/contracts/` from the code: `python -m tests.contracts`."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from webhook.paths import PATH
from webhook.signature import SIGNATURE_HEADER, TIMESTAMP_HEADER
from worker.errors import FailureReason
from worker.quiltt.messages import BALANCE_CREATED, Balance
from worker.rules.job import Job, ReleasedOutcome

FOLDER = Path(__file__).parent.parent / "docs" / "contracts"
DIALECT = "https://json-schema.org/draft/2020-12/schema"
RULE_TEXTS = {
    "gt": "more than {}",
    "ge": "at least {}",
    "lt": "less than {}",
    "le": "at most {}",
    "max_digits": "at most {} digits",
}
"""Rules on decimals in strings, which JSON Schema cannot express."""


class Failure(BaseModel):
    """Arguments of the exception for a failed payment: `PaymentNotReady(reason, detail)`.

    Reasons are never removed. `detail` is text for people and may change.
    """

    model_config = ConfigDict(extra="forbid")

    reason: FailureReason
    detail: str


def _readable(node: Any) -> Any:
    if isinstance(node, list):
        return [_readable(part) for part in node]
    if not isinstance(node, dict):
        return node
    rules = [rule_text.format(node[name]) for name, rule_text in RULE_TEXTS.items() if name in node]
    properties = {
        name: _readable(part)
        for name, part in node.items()
        if name not in RULE_TEXTS and not (name == "title" and isinstance(part, str))
    }
    return {**properties, "$comment": "; ".join(rules)} if rules else properties


RESPONSES = {
    204: "The delivery is stored, quarantined, or irrelevant.",
    400: "The signature is valid, but the body is unreadable, or has unreadable parts that may contain personal data. "
    "The readable events are stored.",
    401: "The signature is not valid, or its timestamp is too far from payready's clock.",
    408: "The body did not arrive in time.",
    413: "The body exceeds the size limit.",
    415: "The content type is not JSON.",
    503: "The delivery cannot be stored now: send it again.",
}
"""Statuses of the webhook's responses and their meaning. The responses have no body."""


def openapi() -> dict[str, Any]:
    """Return the OpenAPI document of the role `web`."""
    record = Balance.model_json_schema(by_alias=True)
    figure = {"type": ["number", "null"]}
    record["properties"] |= dict.fromkeys(("available", "current", "limit"), figure)
    event = {
        "type": "object",
        "required": ["id", "type", "record"],
        "properties": {"id": {"type": "string"}, "type": {"const": BALANCE_CREATED}, "record": _readable(record)},
    }
    delivery = {
        "type": "object",
        "required": ["events"],
        "properties": {"events": {"type": "array", "items": {"anyOf": [event, {"type": "object"}]}}},
    }
    headers = {
        TIMESTAMP_HEADER: {"type": "string", "pattern": "^[0-9]{1,12}$", "description": "Unix seconds."},
        SIGNATURE_HEADER: {
            "type": "string",
            "pattern": "^[A-Za-z0-9+/]{43}=$",
            "description": "Base64 of the HMAC-SHA256, by the subscription's secret, of 1, timestamp and body.",
        },
    }
    parameters = [
        {"in": "header", "name": name, "required": True, "schema": schema} for name, schema in headers.items()
    ]
    webhook = {
        "summary": "One delivery from Quiltt.",
        "parameters": parameters,
        "requestBody": {"required": True, "content": {"application/json": {"schema": delivery}}},
        "responses": {str(status): {"description": text} for status, text in RESPONSES.items()},
    }
    text = {"content": {"text/plain": {"schema": {"type": "string"}}}}
    alive = {"summary": "Liveness of the process.", "responses": {"200": {"description": "The process runs.", **text}}}
    ready = {
        "summary": "Readiness: the process does not stop, and the database is available, so deliveries can be stored.",
        "responses": {"200": {"description": "Available.", **text}, "503": {"description": "Unavailable.", **text}},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "payready: the role web", "version": version("payready")},
        "paths": {PATH: {"post": webhook}, "/healthz": {"get": alive}, "/readyz": {"get": ready}},
    }


def contracts() -> dict[str, str]:
    """Return the text of every file of the folder, by name."""
    return {**schemas(), "openapi.json": json.dumps(openapi(), indent=2) + "\n"}


def schemas() -> dict[str, str]:
    """Return the text of every JSON Schema, by file name."""
    schemas_by_name = {
        "job.schema.json": Job.model_json_schema(mode="validation"),
        "outcome.schema.json": ReleasedOutcome.model_json_schema(mode="serialization"),
        "failure.schema.json": Failure.model_json_schema(mode="serialization"),
    }
    return {
        name: json.dumps({"$schema": DIALECT, **_readable(schema)}, indent=2) + "\n"
        for name, schema in schemas_by_name.items()
    }


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in contracts().items():
        (FOLDER / name).write_text(text)
