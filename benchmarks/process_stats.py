"""CPU and memory of processes by role, from /proc."""

import os
from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

CLOCK_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
ROLE_MARKERS = {
    "web": "-m webhook",
    "worker": "worker@",
    "refresh": "refresh@",
    "beat": " beat",
    "flower": " flower",
    "dashboard": "-m dashboard",
    "valkey": "valkey-server",
    "postgres": "postgres",
    "simulator": "-m simulator",
}
"""Substrings of the command line that identify a role; the first match wins. Other processes count as the client."""
EXCLUDED = ("simulator", "client")


def _roles() -> dict[int, str]:
    """Return the role of this process and of each of its descendants."""
    children = defaultdict(list)
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                children[int(_stat_fields(int(entry.name))[1])].append(int(entry.name))
            except OSError:
                continue  # the process has ended
    roles, pending = {os.getpid(): "client"}, list(children[os.getpid()])
    while pending:
        pid = pending.pop()
        pending += children[pid]
        try:
            line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        roles[pid] = next((role for role, mark in ROLE_MARKERS.items() if mark in line), "client")
    return roles


def _stat_fields(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat after the command, which may contain any character."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def cpu_seconds() -> dict[str, float]:
    """Return the CPU seconds so far by role, including children that have ended."""
    used: dict[str, float] = defaultdict(float)
    for pid, role in _roles().items():
        try:
            used[role] += sum(map(int, _stat_fields(pid)[11:15])) / CLOCK_TICKS_PER_S
        except OSError:
            continue
    return used


def per_1000(before: Mapping[str, float], after: Mapping[str, float], payments: int) -> dict[str, float]:
    """Return the CPU seconds per 1,000 payments by role, and payready's own sum as `total`."""
    spent = {
        role: round((after[role] - before.get(role, 0)) * 1000 / payments, 2) for role in [*ROLE_MARKERS, "client"]
    }
    return {"total": round(sum(v for role, v in spent.items() if role not in EXCLUDED), 2), **spent}


def memory_kib() -> dict[str, int]:
    """Return the proportional set size in bytes by role."""
    used: dict[str, int] = defaultdict(int)
    for pid, role in _roles().items():
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        used[role] += next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)
    return used


def connections(port: int) -> dict[str, int]:
    """Return the number of open connections to a port of this machine, by role."""
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    sockets = {f"socket:[{line[9]}]" for line in lines if line[2].endswith(f":{port:04X}") and line[3] == "01"}
    opened: dict[str, int] = defaultdict(int)
    for pid, role in _roles().items():
        with suppress(OSError):  # the process has ended
            opened[role] += sum(str(link.readlink()) in sockets for link in Path(f"/proc/{pid}/fd").iterdir())
    return {role: count for role, count in opened.items() if count}


def other_busy_cores(seconds: float, spent: Mapping[str, float]) -> float:
    """Return the number of busy cores. `spent` is the difference of two results of `cpu_seconds`."""
    return round(sum(v for role, v in spent.items() if role not in EXCLUDED) / seconds, 3)
