"""Write the JSON Schemas and the OpenAPI document of `docs/contracts/` from the code: `python -m tests.contracts`."""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from webhook.endpoint import PATH
from webhook.events import BALANCE_CREATED
from webhook.signature import SIGNATURE_HEADER, TIMESTAMP_HEADER
from worker.errors import Reason
from worker.quiltt.messages import Balance
from worker.rules.job import Job, Outcome

FOLDER = Path(__file__).parent.parent / "docs" / "contracts"
DIALECT = "https://json-schema.org/draft/2020-12/schema"
WORDS = {"gt": "more than {}", "ge": "at least {}", "le": "at most {}", "max_digits": "at most {} digits"}
"""Rules on decimals in strings, for which JSON Schema has no words of its own."""


class Failure(BaseModel):
    """What the task raises when the payment must not start: `PaymentNotReady(reason, detail)`, as its two arguments.

    Reasons are only ever added. `detail` is for people; it may change.
    """

    model_config = ConfigDict(extra="forbid")

    reason: Reason
    detail: str


def _readable(node: Any) -> Any:
    if isinstance(node, list):
        return [_readable(part) for part in node]
    if not isinstance(node, dict):
        return node
    rules = [words.format(node[name]) for name, words in WORDS.items() if name in node]
    kept = {
        name: _readable(part)
        for name, part in node.items()
        if name not in WORDS and not (name == "title" and isinstance(part, str))
    }
    return {**kept, "$comment": "; ".join(rules)} if rules else kept


ANSWERS = {
    204: "Understood, or kept as it came, and safe; or there was nothing in it for us.",
    400: "Rightly signed, but not readable, or in part not, and what is not might be personal; the rest is safe.",
    401: "Not known to come from Quiltt, or signed too far from our clock.",
    408: "The body did not come in time.",
    413: "The body is over the cap.",
    415: "The body does not call itself JSON.",
    503: "It cannot be made safe just now: send it again.",
}
"""What the webhook answers, and means; never with a body."""


def openapi() -> dict[str, Any]:
    """The endpoints of the role `web`."""
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
        "responses": {str(status): {"description": text} for status, text in ANSWERS.items()},
    }
    text = {"content": {"text/plain": {"schema": {"type": "string"}}}}
    alive = {"summary": "The process lives.", "responses": {"200": {"description": "It does.", **text}}}
    ready = {
        "summary": "Deliveries can be made safe: the database answers.",
        "responses": {"200": {"description": "It does.", **text}, "503": {"description": "It does not.", **text}},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "payready: the role web", "version": version("payready")},
        "paths": {PATH: {"post": webhook}, "/healthz": {"get": alive}, "/readyz": {"get": ready}},
    }


def contracts() -> dict[str, str]:
    """Every file of the folder, and its text."""
    return {**schemas(), "openapi.json": json.dumps(openapi(), indent=2) + "\n"}


def schemas() -> dict[str, str]:
    """The files' names and texts."""
    made = {
        "job.schema.json": Job.model_json_schema(mode="validation"),
        "outcome.schema.json": Outcome.model_json_schema(mode="serialization"),
        "failure.schema.json": Failure.model_json_schema(mode="serialization"),
    }
    return {
        name: json.dumps({"$schema": DIALECT, **_readable(schema)}, indent=2) + "\n" for name, schema in made.items()
    }


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in contracts().items():
        (FOLDER / name).write_text(text)
