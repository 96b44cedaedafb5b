"""Reference pages that are generated from code: commands, tasks and queues, metrics, log events, database schema.

`cli.generated_docs` writes them. A test fails when a page is not current, or when a log event has no meaning here.
"""

import ast
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import typer

from cli.attribute_docstrings import attribute_docstrings
from cli.command_line import EXIT_FAILED, EXIT_NOT_READY
from cli.log_event_meanings import COMPUTED_EVENTS, LOG_EVENT_MEANINGS
from cli.main import app as cli_app
from config.celery_config import QUEUES, celery_settings
from config.settings import Settings
from demo.processes import ROOT, procfile
from tasks.app import app as celery_app
from worker import metrics
from worker.ledger import archive_tables, audit_tables, tables
from worker.ledger.column_types import postgresql_type
from worker.metric_types import Label, MetricDefinition
from worker.webhook_results import DELIVERY_RESULTS

PACKAGES = ("config", "tasks", "webhook", "worker")
"""Packages that log events."""
LOG_METHODS = ("debug", "info", "warning", "error", "exception", "log")
PUBLIC_ARGUMENTS = {"payments.initiate": "the fields of the [job](job-and-outcome.md), or one mapping of them"}
"""Arguments of tasks that are more than the parameters of a function."""
HEAD = "<!-- Generated from code by `make docs`. -->\n"


def _table(header: str, rows: Iterator[str] | list[str]) -> str:
    columns = header.count("|") - 1
    return "\n".join([header, "|" + "---|" * columns, *rows]) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _first_line(docstring: str | None) -> str:
    return (inspect.cleandoc(docstring or "").partition("\n")[0]).strip()


# --- commands ---------------------------------------------------------------------------------------------------------


CLI_HEAD = f"""\
{HEAD}# Commands

`payready COMMAND --help` prints the same.
An option without a default is not set.

| exit status | meaning |
|---|---|
| 0 | success |
| {EXIT_FAILED} | failure: the error is on standard error, or a check failed |
| 2 | wrong usage: an unknown command or option, or a wrong value |
| 2 | `fees reconcile`: invoice and ledger differ; its wrong usage has status {EXIT_FAILED} |
| {EXIT_NOT_READY} | `payment watch`, `payment enqueue --wait`: the payment failed |
| 128 + signal | `demo` or `up` was stopped by a signal before it was complete |
"""
_VALUE_NAMES = {"str": "text", "int": "integer", "list[str]": "texts"}


def cli_page() -> str:
    """Return the page on the commands of `payready`, in the order of `--help`."""
    root: Any = typer.main.get_command(cli_app)
    root.load_all()
    return "\n".join([CLI_HEAD, *(_command_section(path, command) for path, command in _commands("payready", root))])


def _commands(path: str, command: Any) -> Iterator[tuple[str, Any]]:
    if hasattr(command, "commands"):
        if command.invoke_without_command:
            yield path, command
        for name, child in command.commands.items():
            yield from _commands(f"{path} {name}", child)
    else:
        yield path, command


def _command_section(path: str, command: Any) -> str:
    context = typer.Context(command, info_name=path)
    rows = [
        f"| `{' / '.join(parameter.opts)}` | {_values(parameter, context)} | {_default(parameter)} | "
        f"{_cell(parameter.help or '')} |"
        for parameter in command.params
        if parameter.name != "help"
    ]
    table = _table("| argument or option | values | default | meaning |", rows)
    usage = command.get_usage(context).partition(": ")[2]
    return f"## `{path}`\n\n{inspect.cleandoc(command.help or '')}\n\nUsage: `{usage}`\n\n{table}"


def _values(parameter: Any, context: typer.Context) -> str:
    if getattr(parameter, "is_flag", False):
        return ""
    if parameter.min is not None:
        return f"{parameter.min} to {parameter.max}"
    name = parameter.display_type(context).strip("<>")
    return ", ".join(f"`{choice}`" for choice in name.split("|")) if "|" in name else _VALUE_NAMES.get(name, name)


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    return "" if parameter.default in (None, False) else f"`{parameter.default}`"


# --- tasks and queues -------------------------------------------------------------------------------------------------


def tasks_page() -> str:
    """Return the page on Celery tasks, queues and roles."""
    configuration = celery_settings(Settings())
    celery_app.loader.import_default_modules()
    schedule = {entry["task"]: entry["schedule"] for entry in configuration["beat_schedule"].values()}
    rows = [
        f"| `{name}` | {PUBLIC_ARGUMENTS.get(name) or _arguments(name)} | `{route['queue']}` | "
        f"{_interval(schedule.get(name))} | "
        f"{_cell(_first_line(celery_app.tasks[name].__doc__))} |"
        for name, route in configuration["task_routes"].items()
    ]
    tasks = _table("| task | arguments | queue | every | effect |", rows)
    roles = {role: command for role, command in procfile(ROOT / "Procfile").items() if "--queues" in command}
    consumers = {
        queue: [
            role for role, command in roles.items() if queue in command.partition("--queues ")[2].split()[0].split(",")
        ]
        for queue in QUEUES
    }
    queues = _table(
        "| queue | consumed by |",
        [f"| `{queue}` | {', '.join(f'`{role}`' for role in consumers[queue])} |" for queue in QUEUES],
    )
    return (
        f"{HEAD}# Tasks and queues\n\n"
        "Only `payments.initiate`, `payments.cancel` and `payments.end_hold` are contracts with the payments service: "
        "[job and outcome](job-and-outcome.md).\n"
        "All other tasks are internal.\n\n"
        f"## Tasks\n\n{tasks}\n## Queues\n\n"
        "With `PAYREADY_INSTANCE=NAME` each queue is `NAME.QUEUE` on the broker.\n\n"
        f"{queues}"
    )


def _arguments(task: str) -> str:
    parameters = inspect.signature(celery_app.tasks[task].run).parameters
    return ", ".join(f"`{name}`" for name in parameters if name not in ("self", "task"))


def _interval(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:g} s"


# --- metrics ----------------------------------------------------------------------------------------------------------


def metrics_page() -> str:
    """Return the page on all Prometheus metrics."""
    rows = [
        f"| `{_exported_name(metric)}` | {metric.kind} | {metric.source or 'each process'} | {_labels(metric)} | "
        f"{_cell(metric.help_text)} |"
        for metric in sorted(metrics.METRICS, key=lambda metric: metric.name)
    ]
    return (
        f"{HEAD}# Metrics\n\n"
        "Each role exports metrics on `PAYREADY_METRICS_PORT`.\n"
        "Prometheus adds up the values that each process counts.\n"
        "`beat` exports the values that it reads from the database, the broker and Redis.\n"
        "`worker` and `refresh` export those of admission control, which belong to the API key.\n\n"
        f"{_table('| metric | type | source | labels | meaning |', rows)}"
    )


def _exported_name(metric: MetricDefinition) -> str:
    needs_suffix = metric.kind == "counter" and not metric.name.endswith("_total")
    return f"{metric.name}_total" if needs_suffix else metric.name


def _labels(metric: MetricDefinition) -> str:
    if metric.name in WEBHOOK_METRICS:
        return "`result`: see [webhook responses](webhook-responses.md)"
    return "; ".join(_label(label) for label in metric.labels)


def _label(label: Label) -> str:
    values = ", ".join(
        f"`{value}` ({_cell(meaning)})" if meaning else f"`{value}`" for value, meaning in label.values.items()
    )
    return f"`{label.name}`: {values or _cell(label.meaning)}"


WEBHOOK_METRICS = ("payready_webhook_deliveries_total", "payready_webhook_events_total")


def webhook_event_results_table() -> str:
    """Return the table of the results of events for `webhook-responses.md`."""
    (label,) = next(metric for metric in metrics.METRICS if metric.name == "payready_webhook_events_total").labels
    return _table("| result | meaning |", [f"| `{value}` | {_cell(text)} |" for value, text in label.values.items()])


def webhook_results_table() -> str:
    """Return the table of webhook delivery results for `webhook-responses.md`."""
    rows = [f"| `{name}` | {result.status} | {_cell(result.meaning)} |" for name, result in DELIVERY_RESULTS.items()]
    return _table("| result | status | meaning |", rows)


# --- log events -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LogEvent:
    """One place in the code that logs an event."""

    name: str
    level: str
    fields: tuple[str, ...]
    module: str


def log_events() -> list[LogEvent]:
    """Return all log events of the production code, found in its syntax trees."""
    return [
        event
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
        for event in _events_of(str(path.relative_to(ROOT)), path.read_text())
    ]


def _events_of(module: str, source: str) -> Iterator[LogEvent]:
    """Return the events of a module.

    Raises:
        ValueError: a call computes the level or the fields of its event, and `COMPUTED_EVENTS` lacks them.
    """
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id="log"), attr=method)) if method in LOG_METHODS:
                event = _event_of(module, node, method)
                is_computed = method == "log" or any(keyword.arg is None for keyword in node.keywords)
                if is_computed and event.name not in COMPUTED_EVENTS:
                    raise ValueError(f"{module}:{node.lineno}: add {event.name} to COMPUTED_EVENTS")
                yield event


def _event_of(module: str, call: ast.Call, method: str) -> LogEvent:
    name_at = 1 if method == "log" else 0
    match call.args[name_at : name_at + 1]:
        case [ast.Constant(value=str(name))]:
            pass
        case _:
            name = ast.unparse(call)
    fields = tuple(keyword.arg for keyword in call.keywords if keyword.arg and keyword.arg != "exc_info")
    return LogEvent(name=name, level="error" if method == "exception" else method, fields=fields, module=module)


def log_events_page() -> str:
    """Return the page on all log events."""
    by_name: dict[str, list[LogEvent]] = {}
    for event in log_events():
        by_name.setdefault(event.name, []).append(event)
    rows = [_log_event_row(name, found) for name, found in sorted(by_name.items())]
    return (
        f"{HEAD}# Log events\n\n"
        "Each line is one event with fields; names and fields are contracts: [compatibility](compatibility.md).\n"
        "A line also has the ids of its context: `payment_id`, `account_id`, `refresh_id`, `balance_id`, `task_id`.\n\n"
        f"{_table('| event | level | fields | meaning |', rows)}"
    )


def _log_event_row(name: str, found: list[LogEvent]) -> str:
    computed = COMPUTED_EVENTS.get(name)
    if computed:
        levels = [f"{level} ({condition})" for level, condition in computed.levels.items()]
        fields = computed.fields
    else:
        levels = sorted({event.level for event in found})
        fields = tuple(dict.fromkeys(field for event in found for field in event.fields))
    cells = (f"`{name}`", ", ".join(levels), ", ".join(f"`{field}`" for field in fields))
    return f"| {' | '.join(cells)} | {_cell(LOG_EVENT_MEANINGS.get(name, ''))} |"


# --- database schema --------------------------------------------------------------------------------------------------


def schema_page() -> str:
    """Return the page on tables, columns and indexes."""
    documented = dict(_table_and_column_docstrings())
    sections = [_table_section(table, documented) for table in tables.ALL_TABLES]
    return f"{HEAD}# Database schema\n\nTimes are UTC. Types are those of PostgreSQL.\n\n" + "\n".join(sections)


def _table_and_column_docstrings() -> Iterator[tuple[str, Mapping[str, str]]]:
    """Yield for each table its attribute docstrings, and its class docstring under the empty name."""
    sources = (inspect.getsource(module) for module in (tables, audit_tables, archive_tables))
    for node in (node for source in sources for node in ast.parse(source).body):
        if not isinstance(node, ast.ClassDef):
            continue
        columns = {name: _cell(text) for name, text in attribute_docstrings(node).items()}
        texts = {"": _first_line(ast.get_docstring(node)), **columns}
        for statement in node.body:
            if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__tablename__":
                yield str(ast.literal_eval(statement.value)), texts


def _table_section(table: Any, documented: Mapping[str, Mapping[str, str]]) -> str:
    texts = documented.get(table.name, {})
    columns = [
        f"| `{name}` | {_type_and_keys(column)} | {'yes' * column.nullable} | {texts.get(name, '')} |"
        for name, column in table.columns.items()
    ]
    indexes = [
        f"| `{index.name}` | {', '.join(f'`{column.name}`' for column in index.columns)} | "
        f"{'unique' if index.unique else ''} | {_condition(index)} |"
        for index in sorted(table.indexes, key=lambda index: str(index.name))
    ]
    index_table = _table("| index | columns | | where |", indexes) if indexes else ""
    return (
        f"## `{table.name}`\n\n{texts.get('', '')}\n\n"
        f"{_table('| column | type | null | meaning |', columns)}\n{index_table}"
    )


def _condition(index: Any) -> str:
    where = index.dialect_options["postgresql"].get("where")
    return "" if where is None else f"`{_cell(str(where))}`"


def _type_and_keys(column: Any) -> str:
    """Return the column's type on PostgreSQL, whether it is the primary key, and the table that it refers to."""
    name = postgresql_type(column).lower()
    primary_key = ", primary key" if column.primary_key else ""
    references = "".join(f", references `{key.column.table.name}`" for key in column.foreign_keys)
    return f"{name}{primary_key}{references}"
