"""The parts of the documentation that are made from code: `python -m cli.generated_docs`, or `make docs`.

A test fails when one of them is not what the code says.
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

from config.settings import ENV_PREFIX, Settings
from demo.processes import ROOT
from worker.rules.states import PAYMENT_TRANSITIONS, REFRESH_TRANSITIONS, PaymentState, RefreshState

CONFIGURATION_HEAD = """\
# Configuration

Every setting is an environment variable. A name that is misspelt, a value that breaks its rule, or a secret that is
missing in production stops the start with one sentence. `.env.example` has them all, ready to be copied.

This page is made from `config/settings.py`; `make docs` renews it.

| variable | default | rule | meaning |
|---|---|---|---|
"""
ENVIRONMENT_HEAD = """\
# Every setting of payready with its default. Copy this file to .env, and take off the # of what you change.
# payready reads its environment, not this file: `set -a; . ./.env; set +a`, a container runtime or systemd loads it.
# Made from config/settings.py; `make docs` renews it.
"""


def generated_files() -> dict[Path, str]:
    """Every file that has parts made from code, as it should be."""
    return {
        ROOT / "docs" / "reference" / "configuration.md": configuration_page(),
        ROOT / ".env.example": env_example(),
        ROOT / "docs" / "explanation" / "architecture.md": _with_diagrams(
            (ROOT / "docs" / "explanation" / "architecture.md").read_text()
        ),
    }


# --- the laws ---------------------------------------------------------------------------------------------------------


def state_diagram(transitions: Mapping[tuple[Any, Any], Any], initial: StrEnum) -> str:
    """A table of transitions as a Mermaid diagram; what nothing leads out of is final."""
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
        begin, end = f"<!-- {name}: made from worker/rules/states.py -->\n", f"<!-- end of {name} -->\n"
        before, found, rest = page.partition(begin)
        _, closed, after = rest.partition(end)
        if not (found and closed):
            raise ValueError(f"docs/explanation/architecture.md has no place for the diagram of the {name}")
        page = f"{before}{begin}```mermaid\n{diagram}\n```\n{end}{after}"
    return page


# --- the settings -----------------------------------------------------------------------------------------------------


def configuration_page() -> str:
    """The page on the settings."""
    rows = (
        f"| `{ENV_PREFIX}{name.upper()}` | {_default(field)} | {_rule(field)} | {_description(field)} |"
        for name, field in Settings.model_fields.items()
    )
    return CONFIGURATION_HEAD + "\n".join(rows) + "\n"


def env_example() -> str:
    """The example of an environment."""
    blocks = (
        f"\n# {_description(field)}\n#{ENV_PREFIX}{name.upper()}={_plain_default(field)}\n"
        for name, field in Settings.model_fields.items()
    )
    return ENVIRONMENT_HEAD + "".join(blocks)


def _description(field: FieldInfo) -> str:
    return " ".join((field.description or "").split())


def _plain_default(field: FieldInfo) -> str:
    value = field.get_default()
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    if isinstance(value, Path):
        return str(value.relative_to(ROOT))
    if isinstance(value, bool):
        return str(value).lower()
    return "" if value in (None, ()) else str(value)


def _default(field: FieldInfo) -> str:
    return f"`{text}`" if (text := _plain_default(field)) else "none"


def _rule(field: FieldInfo) -> str:
    bounds = {type(item).__name__.lower(): item for item in field.metadata}
    parts = [_kind(field.annotation)]
    if "ge" in bounds or "gt" in bounds:
        low = f"from {bounds['ge'].ge}" if "ge" in bounds else f"above {bounds['gt'].gt}"
        parts.append(f"{low} to {bounds['le'].le}" if "le" in bounds else f"{low}")
    pattern = next((item.pattern for item in field.metadata if getattr(item, "pattern", None)), None)
    return ", ".join([*parts, f"`{pattern}`"] if pattern else parts)


def _kind(annotation: Any) -> str:
    """What a value looks like, to a reader who knows no Python."""
    if typing.get_origin(annotation) is typing.Literal:
        return ", ".join(f"`{word}`" for word in typing.get_args(annotation))
    if isinstance(annotation, UnionType):
        return _kind(next(part for part in typing.get_args(annotation) if part is not NoneType))
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
    """Write what is not as it should be."""
    for path, text in generated_files().items():
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
            sys.stdout.write(f"renewed {path.relative_to(ROOT)}\n")


if __name__ == "__main__":
    main()
