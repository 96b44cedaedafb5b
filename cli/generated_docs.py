"""Write the documents that are generated from code: `python -m cli.generated_docs`, or `make docs`.

A test fails when one of them is not current.
"""

import sys
import typing
from collections.abc import Mapping
from decimal import Decimal
from enum import StrEnum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any

from pydantic import SecretStr
from pydantic.fields import FieldInfo

from cli.attribute_docstrings import setting_docstrings
from cli.reference_pages import (
    HEAD,
    cli_page,
    log_events_page,
    metrics_page,
    schema_page,
    tasks_page,
    webhook_event_results_table,
    webhook_results_table,
)
from cli.setting_groups import SETTING_GROUPS
from config.setting_types import variable_name
from config.settings import Settings
from demo.processes import ROOT
from worker.rules.states import PAYMENT_TRANSITIONS, REFRESH_TRANSITIONS, PaymentState, RefreshState

CONFIGURATION_HEAD = f"""\
{HEAD}# Configuration

Every setting is an environment variable.
An unknown name, a bad value, or a missing secret in production stops the start with one sentence.
`.env.example` has all settings, ready to copy.
A role reads its settings at its start: after a change, restart the roles in the column *restart*.
[Other variables](#other-variables) belong to platforms and to Flower.
"""
ENVIRONMENT_HEAD = """\
# Every setting of payready with its default. Copy this file to payready.env and uncomment what you change.
# payready reads its environment, not this file.
# To load it: `set -a; . ./payready.env; set +a`, Compose's `env_file`, or systemd's `EnvironmentFile`.
# `make docs` generates this file from config/settings.py.
"""
_PORT = """Port of the webhook endpoint, as platforms that run a `Procfile` set it.
`PAYREADY_WEBHOOK_PORT` overrides it. Only `web` reads it."""
OTHER_VARIABLES: Mapping[str, tuple[str, str]] = {
    "PORT": ("", " ".join(_PORT.split())),
    "FLOWER_BASIC_AUTH": ("", "Logins of Flower, as `user:password`, separated by commas. `flower` requires it."),
    "FLOWER_ADDRESS": ("127.0.0.1", "Address on which Flower listens."),
    "FLOWER_PORT": ("5555", "Port on which Flower listens."),
}
"""Variables without the prefix that roles read, each with its default and its meaning."""


def generated_files() -> dict[Path, str]:
    """Return every file with generated parts, as it should be."""
    reference, architecture = ROOT / "docs" / "reference", ROOT / "docs" / "explanation" / "architecture.md"
    responses = reference / "webhook-responses.md"
    return {
        ROOT / ".env.example": env_example(),
        architecture: _with_diagrams(architecture.read_text()),
        responses: _with_webhook_tables(responses.read_text()),
        reference / "configuration.md": configuration_page(),
        reference / "cli.md": cli_page(),
        reference / "tasks-and-queues.md": tasks_page(),
        reference / "metrics.md": metrics_page(),
        reference / "log-events.md": log_events_page(),
        reference / "database-schema.md": schema_page(),
    }


# --- state machines ---------------------------------------------------------------------------------------------------


def state_diagram(transitions: Mapping[tuple[Any, Any], Any], initial: StrEnum) -> str:
    """Return a Mermaid diagram of a transition table. A state without a transition out of it is final."""
    lines = ["stateDiagram-v2", f"    [*] --> {initial}"]
    lines += [f"    {state} --> {after}: {event}" for (state, event), after in transitions.items()]
    leaving = {state for state, _ in transitions}
    finals = dict.fromkeys(after for after in transitions.values() if after not in leaving)
    return "\n".join([*lines, *(f"    {state} --> [*]" for state in finals)])


def _with_diagrams(page: str) -> str:
    diagrams = {
        "payment": state_diagram(PAYMENT_TRANSITIONS, PaymentState.WAITING),
        "refresh": state_diagram(REFRESH_TRANSITIONS, RefreshState.REQUESTED),
    }
    for name, diagram in diagrams.items():
        page = _with_part(page, name, "worker/rules/states.py", f"```mermaid\n{diagram}\n```\n")
    return page


def _with_webhook_tables(page: str) -> str:
    page = _with_part(page, "results", "worker/webhook_results.py", webhook_results_table())
    return _with_part(page, "results of events", "worker/metrics.py", webhook_event_results_table())


def _with_part(page: str, name: str, source: str, part: str) -> str:
    """Return the page with the generated part between its two markers.

    Raises:
        ValueError: the page has no such markers.
    """
    begin, end = f"<!-- {name}: made from {source} -->\n", f"<!-- end of {name} -->\n"
    before, found, rest = page.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"a page lacks the markers {begin.strip()} and {end.strip()}")
    return f"{before}{begin}{part}{end}{after}"


# --- settings -----------------------------------------------------------------------------------------------------


def configuration_page() -> str:
    """Return the page on settings."""
    sections = (
        f"\n## {topic}\n\n| variable | default | rule | restart | meaning |\n|---|---|---|---|---|\n"
        + "".join(_setting_row(name, roles) for name, roles in restarts.items())
        for topic, restarts in SETTING_GROUPS.items()
    )
    return CONFIGURATION_HEAD + "".join(sections) + _other_variables_section()


def _other_variables_section() -> str:
    rows = (
        f"| `{name}` | {f'`{default}`' if default else 'none'} | {meaning} |\n"
        for name, (default, meaning) in OTHER_VARIABLES.items()
    )
    return "\n## Other variables\n\n| variable | default | meaning |\n|---|---|---|\n" + "".join(rows)


def _setting_row(name: str, roles: str) -> str:
    field = Settings.model_fields[name]
    return (
        f"| `{variable_name(name)}` | {_default(field)} | {_type_and_constraints(field)} | {roles} | "
        f"{setting_docstrings()[name]} |\n"
    )


def env_example() -> str:
    """Return the example environment file."""
    blocks = (
        f"\n# {setting_docstrings()[name]}\n#{variable_name(name)}={_plain_default(field)}\n"
        for name, field in Settings.model_fields.items()
    )
    others = (f"\n# {meaning}\n#{name}={default}\n" for name, (default, meaning) in OTHER_VARIABLES.items())
    return ENVIRONMENT_HEAD + "".join([*blocks, *others])


def _plain_default(field: FieldInfo) -> str:
    value = field.get_default()
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    if isinstance(value, Path):
        return str(value.relative_to(ROOT))
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    if value is None or not str(value).isprintable():  # an empty variable is unset, so control characters need no line
        return ""
    return str(value)


def _default(field: FieldInfo) -> str:
    return f"`{text}`" if (text := _plain_default(field)) else "none"


def _type_and_constraints(field: FieldInfo) -> str:
    bounds = {type(item).__name__.lower(): item for item in field.metadata}
    parts = [_type_in_words(field.annotation)]
    if "ge" in bounds or "gt" in bounds:
        low = f"from {bounds['ge'].ge}" if "ge" in bounds else f"above {bounds['gt'].gt}"
        parts.append(f"{low} to {bounds['le'].le}" if "le" in bounds else f"{low}")
    pattern = next((item.pattern for item in field.metadata if getattr(item, "pattern", None)), None)
    return ", ".join([*parts, f"`{pattern}`"] if pattern else parts)


def _type_in_words(annotation: Any) -> str:
    """Return the kind of value in words, for readers without Python."""
    if typing.get_origin(annotation) is typing.Literal:
        return ", ".join(f"`{word}`" for word in typing.get_args(annotation))
    if isinstance(annotation, UnionType):
        return _type_in_words(next(part for part in typing.get_args(annotation) if part is not NoneType))
    if typing.get_origin(annotation) is tuple:
        return "separated by commas"
    names = {
        int: "whole number",
        float: "number",
        Decimal: "number",
        bool: "`true` or `false`",
        SecretStr: "secret",
        Path: "file",
    }
    return names.get(annotation, "text")


def main() -> None:
    """Write the files that are not current."""
    for path, text in generated_files().items():
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
            sys.stdout.write(f"updated {path.relative_to(ROOT)}\n")


if __name__ == "__main__":
    main()
