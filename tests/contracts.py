"""Write the JSON Schemas of `docs/contracts/` from the models: `python -m tests.contracts`."""

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from worker.errors import Reason
from worker.messages import Job, Outcome

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
    for name, text in schemas().items():
        (FOLDER / name).write_text(text)
