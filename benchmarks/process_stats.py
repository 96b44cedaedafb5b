"""What processes use, from /proc: CPU by role, memory."""

import os
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

CLOCK_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
ROLE_MARKERS = {
    "web": "-m webhook",
    "worker": "worker@",
    "refresh": "refresh@",
    "beat": " beat",
    "flower": " flower",
    "valkey": "valkey-server",
    "postgres": "postgres",
    "simulator": "-m simulator",
}
"""A role's processes are known by their command line; the order decides. All else is the client, who measures too."""
EXCLUDED = ("simulator", "client")


def _roles() -> dict[int, str]:
    """This process and all that descend from it, with the role of each."""
    children = defaultdict(list)
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                children[int(_stat_fields(int(entry.name))[1])].append(int(entry.name))
            except OSError:
                continue  # it ended meanwhile
    found, todo = {os.getpid(): "client"}, list(children[os.getpid()])
    while todo:
        pid = todo.pop()
        todo += children[pid]
        try:
            line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        found[pid] = next((role for role, mark in ROLE_MARKERS.items() if mark in line), "client")
    return found


def _stat_fields(pid: int) -> list[str]:
    """Of /proc/PID/stat from the state on; the command before it may contain anything."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def cpu_seconds() -> dict[str, float]:
    """CPU seconds so far by role, those of children that ended included."""
    used: dict[str, float] = defaultdict(float)
    for pid, role in _roles().items():
        try:
            used[role] += sum(map(int, _stat_fields(pid)[11:15])) / CLOCK_TICKS_PER_S
        except OSError:
            continue
    return used


def per_1000(before: Mapping[str, float], after: Mapping[str, float], payments: int) -> dict[str, float]:
    """CPU seconds per 1,000 payments by role, and of all that is ours in `total`."""
    spent = {
        role: round((after[role] - before.get(role, 0)) * 1000 / payments, 2) for role in [*ROLE_MARKERS, "client"]
    }
    return {"total": round(sum(v for role, v in spent.items() if role not in EXCLUDED), 2), **spent}


def memory_kib() -> dict[str, int]:
    """Proportional set size in bytes by role."""
    used: dict[str, int] = defaultdict(int)
    for pid, role in _roles().items():
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        used[role] += next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)
    return used


def other_busy_cores(seconds: float, spent: Mapping[str, float]) -> float:
    """CPU seconds spent, as cores; `spent` as `cpu` tells it, after less before."""
    return round(sum(v for role, v in spent.items() if role not in EXCLUDED) / seconds, 3)
