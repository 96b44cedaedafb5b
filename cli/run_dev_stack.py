"""`payready up`: the demo's stack until Ctrl-C. Its data stays in `.run/up/`."""

import fcntl
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.console import Console
from rich.table import Table

from cli import render
from demo.dev_stack import DASHBOARD_LOGIN, FLOWER_LOGIN, DevStack, PreferredPorts, start_sqlite_dev_stack
from demo.interrupts import Interrupted, Interrupts
from demo.processes import ROOT, StartOrExitError

RUN_FOLDER = ROOT / ".run" / "up"
PORTS = PreferredPorts(web=8000, flower=5555, dashboard=8080, simulator=9900, valkey=6390)
CHECK_INTERVAL_S = 0.5


def write_env_file_and_run_dev_stack(
    console: Console, interrupts: Interrupts, *, as_json: bool, folder: Path = RUN_FOLDER
) -> None:
    """Run payready until a signal is received. Once it is up, write its settings to `env` and print its addresses.

    Raises:
        StartOrExitError: a process did not start, or exited, or payready is already up in this folder.
        Interrupted: a signal was received before payready was up.
    """
    with _lock_folder(folder), start_sqlite_dev_stack(folder, interrupts.check, PORTS) as stack:
        environ = folder / "env"
        environ.write_text("".join(f"export {key}={shlex.quote(value)}\n" for key, value in stack.settings.items()))
        if as_json:
            typer.echo(render.as_json(_addresses(stack) | {"settings": str(environ)}))
        else:
            print_addresses_and_examples(console, stack, environ)
        try:
            while True:
                stack.processes.check_all_running()
                interrupts.sleep(CHECK_INTERVAL_S)
        except Interrupted:
            console.print("stopping ...")


@contextmanager
def _lock_folder(folder: Path) -> Iterator[None]:
    """Lock the folder: only one stack at a time can use it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StartOrExitError(f"payready is already up; its addresses are in {folder / 'env'}") from None
        yield


def print_addresses_and_examples(console: Console, stack: DevStack, environ: Path) -> None:
    """Print the addresses of a stack, and commands to try. `environ` is the file with its settings."""
    table = Table(box=None, pad_edge=False, show_header=False)
    remarks = {
        "dashboard": f"  login {DASHBOARD_LOGIN}",
        "flower": f"  login {FLOWER_LOGIN}",
        "simulator": "  (simulates Quiltt; scenarios: python -m simulator --list)",
    }
    for name, address in _addresses(stack).items():
        table.add_row(name.replace("_", " "), address + remarks.get(name, ""))
    console.print("[bold green]payready is up.[/] Ctrl-C stops it; the ledger stays.\n", highlight=False)
    console.print(table, soft_wrap=True)
    console.print("\nIn another terminal, enqueue a payment and inspect it:\n")
    for line in (f". {shlex.quote(str(environ))}", *EXAMPLES):
        console.print(f"    {line}", style="cyan", highlight=False, soft_wrap=True)
    console.print()


def _addresses(stack: DevStack) -> dict[str, str]:
    return {
        "webhook_endpoint": f"{stack.web_url}/webhooks/quiltt",
        "dashboard": stack.dashboard_url,
        "flower": stack.flower_url,
        "simulator": stack.simulator_url,
        "broker_and_results": stack.redis_url,
        "ledger": stack.database_url,
        **{f"metrics_of_{role}": url for role, url in stack.metrics_urls.items()},
        "logs": str(stack.processes.folder),
    }


EXAMPLES = (
    ".venv/bin/payready payment enqueue acct_slow01 --amount 25.00 --id pay_1 --wait",
    ".venv/bin/payready payment show pay_1",
    ".venv/bin/payready fees statement",
)
