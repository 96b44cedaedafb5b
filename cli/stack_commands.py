"""Commands that run payready on this machine: the demo, and the whole stack."""

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import typer
from rich.console import Console

from cli import render, run_demo, run_dev_stack
from cli.command_line import EXIT_FAILED, AsJson, report_errors, stdout_console_for_terminal_or_log
from demo.interrupts import Interrupted, Interrupts, interrupts
from demo.processes import StartOrExitError

T = TypeVar("T")


def demo_command(as_json: AsJson = False) -> None:
    """Run 31 jobs in 17 scenarios through all roles on this machine and check the results.

    Exit status 1 if a result differs.
    """
    result = _run_or_exit_on_interrupt(run_demo.run_demo, as_json=as_json)
    if as_json:
        typer.echo(render.as_json({"passed": result.passed, **vars(result)}))
    if not result.passed:
        raise typer.Exit(EXIT_FAILED)


def up_command(as_json: AsJson = False) -> None:
    """Run payready on this machine against a simulator of Quiltt, until Ctrl-C."""
    _run_or_exit_on_interrupt(partial(run_dev_stack.write_env_file_and_run_dev_stack, as_json=as_json), as_json=as_json)


def _run_or_exit_on_interrupt(run: Callable[[Console, Interrupts], T], *, as_json: bool) -> T:
    console = Console(stderr=True) if as_json else stdout_console_for_terminal_or_log()
    with report_errors(StartOrExitError), interrupts() as signals:
        try:
            return run(console, signals)
        except Interrupted as interrupted:
            console.print(f"stopped by {interrupted}; all processes have ended")
            raise typer.Exit(interrupted.status) from None
