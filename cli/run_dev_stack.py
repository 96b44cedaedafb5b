"""`payready up`: the same processes, for as long as you like; what they learn is kept in `.run/up/`."""

import fcntl
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

from cli import render
from demo.dev_stack import FLOWER_LOGIN, DevStack, PreferredPorts, dev_stack
from demo.interrupts import Interrupted, Interrupts
from demo.processes import ROOT, StartError

RUN_FOLDER = ROOT / ".run" / "up"
PORTS = PreferredPorts(web=8000, flower=5555, simulator=9900, valkey=6390)
CHECK_INTERVAL_S = 0.5


def run_dev_stack(console: Console, interrupts: Interrupts, *, as_json: bool, folder: Path = RUN_FOLDER) -> None:
    """Run payready until a signal comes; say where all of it is once it is up, `as_json` on standard output.

    Raises:
        StartError: a process did not come up, ended by itself, or payready is up in this folder already.
        Interrupted: before it was up.
    """
    with _lock_folder(folder), dev_stack(folder, interrupts.check, PORTS) as running:
        environ = folder / "env"
        environ.write_text("".join(f"export {key}={shlex.quote(value)}\n" for key, value in running.settings.items()))
        if as_json:
            typer.echo(render.as_json(_addresses(running) | {"settings": str(environ)}))
        else:
            _print_addresses(console, running, environ)
        try:
            while True:
                running.processes.check_all_running()
                interrupts.sleep(CHECK_INTERVAL_S)
        except Interrupted:
            console.print("stopping ...")


@contextmanager
def _lock_folder(folder: Path) -> Iterator[None]:
    """Hold the folder, which one payready at a time can use."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StartError(f"payready is up already: its addresses are in {folder / 'env'}") from None
        yield


def _print_addresses(console: Console, running: DevStack, environ: Path) -> None:
    table = Table(box=None, pad_edge=False, show_header=False)
    remarks = {"flower": f"  login {FLOWER_LOGIN}", "simulator": "  (stands in for Quiltt; python -m simulator --list)"}
    for what, where in _addresses(running).items():
        table.add_row(what.replace("_", " "), where + remarks.get(what, ""))
    console.print("[bold green]payready is up.[/] Ctrl-C stops it; what is in the ledger stays.\n", highlight=False)
    console.print(table, soft_wrap=True)
    console.print("\nIn another terminal, start a payment and look at it:\n")
    for line in (f". {shlex.quote(str(environ))}", *EXAMPLES):
        console.print(f"    {line}", style="cyan", highlight=False, soft_wrap=True)
    console.print()


def _addresses(running: DevStack) -> dict[str, str]:
    return {
        "webhook_endpoint": f"{running.web_url}/webhooks/quiltt",
        "flower": running.flower_url,
        "simulator": running.simulator_url,
        "broker_and_results": running.redis_url,
        "ledger": running.database_url,
        **{f"metrics_of_{role}": url for role, url in running.metrics_urls.items()},
        "logs": str(running.processes.folder),
    }


EXAMPLES = (
    ".venv/bin/payready payment enqueue acct_slow01 --amount 25.00 --id pay_1 --wait",
    ".venv/bin/payready payment show pay_1",
    ".venv/bin/payready fees statement",
)
