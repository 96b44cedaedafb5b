"""The memory of the role's process is bounded whatever operators upload, and other users are served meanwhile."""

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from demo.processes import ROOT, assign_free_port, responds
from tests.dashboard.conftest import PASSWORD, USERS, csrf_token_in
from tests.support.databases import Databases
from tests.support.invoice_bombs import BOMBS, SHARED_TEXTS, SST_HEAD, spreadsheet_with
from tests.support.system import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.parametrize("databases", ["sqlite"], indirect=True)]
MAX_GROWTH_MIB = 330
"""The limit of the container is 512 MiB, and the process begins with about 150 MiB."""
UNPACKED_MIB = 100


@pytest.fixture
def role(databases: Databases, valkey_url: str, tmp_path: Path) -> Iterator[tuple[str, int]]:
    """The URL and the id of a process of the role."""
    port = assign_free_port()
    with databases.create() as database_url, (tmp_path / "log").open("wb") as log:
        environ = {
            "PAYREADY_DATABASE_URL": database_url,
            "PAYREADY_REDIS_URL": valkey_url,
            "PAYREADY_DASHBOARD_PORT": str(port),
            "PAYREADY_DASHBOARD_USERS": USERS,
            "PAYREADY_INSTANCE": f"memory-{port}",
        }
        process = subprocess.Popen(
            [sys.executable, "-m", "dashboard"], cwd=ROOT, env={**os.environ, **environ}, stdout=log, stderr=log
        )
        try:
            url = f"http://127.0.0.1:{port}"
            wait_until(lambda: responds(f"{url}/readyz"), 30, "the role is ready")
            yield url, process.pid
        finally:
            process.terminate()
            process.wait(20)


def peak_mib(pid: int) -> int:
    [peak_kib] = re.findall(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(peak_kib) // 1024


def test_files_that_unpack_to_much_need_little_memory(role: tuple[str, int]) -> None:
    url, pid = role
    pages_read, stop = [0], threading.Event()

    def read_pages() -> None:
        with httpx.Client(base_url=url, timeout=30) as client:
            assert client.post("/login", data={"name": "victor", "password": PASSWORD}).status_code == 303
            while not stop.is_set():
                assert client.get("/audit").status_code == 200
                pages_read[0] += 1

    with httpx.Client(base_url=url, timeout=60) as operator:
        assert operator.post("/login", data={"name": "olivia", "password": PASSWORD}).status_code == 303
        form = {"csrf_token": csrf_token_in(operator.get("/fees/reconcile").text), "month": "2026-11"}
        files = {"small.csv": b"a,b\n", **{f"{name}.xlsx": make(UNPACKED_MIB) for name, (make, _) in BOMBS.items()}}
        text = b"<si><t>%s\xf0\x9f\x98\x80</t></si>" % (b"x" * 1000)
        texts = SST_HEAD + text * ((UNPACKED_MIB << 20) // len(text)) + b"</sst>"
        files["wide texts.xlsx"] = spreadsheet_with(SHARED_TEXTS, texts)
        files["line.csv"] = b"Account,Date,Amount\n" + b"x" * (15 << 20)
        files["cells.csv"] = b"Account,Date,Amount\n" + b"," * (15 << 20)
        files["cells in lines.csv"] = b"Account,Date,Amount\n" + b'"\n",' * (3 << 20)
        files["quote.csv"] = b'Account,Date,Amount\n"' + b"x\n" * (7 << 20)
        reader = threading.Thread(target=read_pages)
        first_peak = 0
        for name, data in files.items():
            response = operator.post("/fees/reconcile", data=form, files={"invoice": (name, data)})
            assert response.status_code == 400, name
            assert 'role="alert"' in response.text, name
            if not first_peak:
                first_peak = peak_mib(pid)
                reader.start()
    stop.set()
    reader.join()
    assert peak_mib(pid) - first_peak < MAX_GROWTH_MIB
    assert pages_read[0] > len(files), "others can read pages meanwhile"
