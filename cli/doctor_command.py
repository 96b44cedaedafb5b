"""The command `payready doctor`."""

from typing import Annotated

import typer
from rich.text import Text

from cli import doctor, render
from cli.command_line import EXIT_FAILED, AsJson, report_errors, stdout_console_for_terminal_or_log
from cli.doctor_results import CheckResult, Severity
from cli.render import literal_text
from config.role_settings import require_in_production
from config.settings import settings
from worker.runtime import build_runtime

_SEVERITY_MARKS = {
    Severity.OK: ("✓ ", "green"),
    Severity.WARNING: ("! ", "yellow"),
    Severity.ERROR: ("✗ ", "red"),
}


def doctor_command(
    flower: Annotated[str, typer.Option(help="URL of Flower.")] = "http://127.0.0.1:5555",
    web: Annotated[
        str | None,
        typer.Option(help="URL of `web`, preferably the public one. Default: this host, at PAYREADY_WEBHOOK_PORT."),
    ] = None,
    dashboard: Annotated[
        str | None, typer.Option(help="URL of the dashboard. Default: this host, at PAYREADY_DASHBOARD_PORT.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check all dependencies and print how to fix problems. Exit status 1 if a check fails."""
    with report_errors():
        require_in_production(settings(), "database_url", "redis_url")
        # The runtime is not closed: a check that hangs still uses it.
        results = doctor.run_checks(settings(), build_runtime(settings()), flower, web, dashboard)
        found = list(results if as_json else map(_print_check_result, results))
        if as_json:
            typer.echo(render.as_json(found))
    if any(result.severity == Severity.ERROR for result in found):
        raise typer.Exit(EXIT_FAILED)


def _print_check_result(result: CheckResult) -> CheckResult:
    stdout_console_for_terminal_or_log().print(check_result_text(result), highlight=False, soft_wrap=True)
    return result


def check_result_text(result: CheckResult) -> Text:
    """Return a check result as one line, and the fix as a second one."""
    mark, style = _SEVERITY_MARKS[result.severity]
    text = Text().append(mark, f"bold {style}").append(literal_text(f"{result.check}: {result.message}"))
    return text.append("\n    ").append(literal_text(result.fix, style)) if result.fix else text
