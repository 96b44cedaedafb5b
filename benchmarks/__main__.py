"""`make bench`: measure payready on this machine, print the measurements and write them as JSON."""

import argparse
import json
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import command_cpu, dashboard_pages, half_year, webhook_throughput
from benchmarks.benchmark_system import benchmark_system
from benchmarks.cases import CASES

STANDALONE_CASES = {
    "webhook": webhook_throughput.measure,
    "retention": half_year.measure,
    "dashboard": dashboard_pages.measure,
    "commands": command_cpu.measure,
}
"""Cases that do not need the whole system."""
RESULTS = Path(__file__).parent / "results" / "latest.json"


def _parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    parser.add_argument(
        "--only", choices=[*CASES, *STANDALONE_CASES], action="append", help="run only this case; can be repeated"
    )
    parser.add_argument("--rounds", type=int, default=1, help="number of rounds, each on a new system")
    parser.add_argument("--n", type=int, default=2000, help="burst, sizing: number of payments")
    parser.add_argument("--rate", type=float, default=20, help="paced: payments per second")
    parser.add_argument("--seconds", type=float, default=20, help="paced: duration in seconds")
    parser.add_argument("--readers", type=int, default=0, help="paced: number of browsers on the dashboard")
    parser.add_argument("--hot", type=int, default=1000, help="hot_accounts: payments on ten accounts")
    parser.add_argument("--waiting", type=int, default=5000, help="idle_waiting: number of payments")
    parser.add_argument("--entries", type=int, default=1_000_000, help="statement: number of fee entries")
    parser.add_argument("--lines", type=int, default=1_000_000, help="reconcile: number of calls of the month")
    parser.add_argument("--payments", type=int, default=1_000_000, help="retention, dashboard: number of payments")
    parser.add_argument("--dashboard-waiting", type=int, default=10_000, help="dashboard: number of waiting payments")
    parser.add_argument(
        "--dashboard-starts", type=int, default=5, help="dashboard: starts of the role for each page's first request"
    )
    parser.add_argument("--webhook-rounds", type=int, default=5, help="webhook: alternating rounds of each handler")
    parser.add_argument(
        "--deliveries", type=int, default=1_000_000, help="webhook: deliveries of the memory measurement"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="file to which the measurements are written")
    return parser.parse_args()


def _flat(measurements: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows = []
    for name, value in measurements.items():
        rows += _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(f"{prefix}{name}", str(value))]
    return rows


def _show(console: Console, case: str, rounds: list[dict[str, Any]]) -> None:
    table = Table("measurement", *(f"round {number}" for number in range(1, len(rounds) + 1)), title=case)
    for lines in zip(*map(_flat, rounds), strict=True):
        table.add_row(lines[0][0], *(value for _, value in lines))
    console.print(table)


def _measure(case: str, sizes: argparse.Namespace) -> dict[str, Any]:
    if case in STANDALONE_CASES:
        return dict(STANDALONE_CASES[case](sizes))
    with benchmark_system() as running:
        return CASES[case](running, sizes)


def main() -> None:
    """Run the selected cases and write the measurements."""
    sizes, console = _parse_options(), Console()
    measurements: dict[str, list[dict[str, Any]]] = {case: [] for case in sizes.only or [*CASES, *STANDALONE_CASES]}
    for _ in range(sizes.rounds):
        for case, rounds in measurements.items():
            with console.status(f"{case}: {(STANDALONE_CASES.get(case) or CASES[case]).__doc__}"):
                rounds.append(_measure(case, sizes))
    for case, rounds in measurements.items():
        _show(console, case, rounds)
    machine = {"cores": os.cpu_count(), "python": platform.python_version(), "system": platform.platform()}
    chosen = {name: value for name, value in vars(sizes).items() if name not in ("out", "only")}
    when = datetime.now(UTC).isoformat(timespec="seconds")
    report = {"at": when, "machine": machine, "sizes": chosen, "cases": measurements}
    sizes.out.parent.mkdir(parents=True, exist_ok=True)
    sizes.out.write_text(json.dumps(report, indent=1) + "\n")
    console.print(f"written to {sizes.out}")


if __name__ == "__main__":
    main()
