"""Clients of the dashboard that behave like browsers: they log in, follow the page Now, and read pages in turn."""

import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import httpx

from dashboard.access.password_hashes import hash_password

USER, PASSWORD = "bench", "only for the benchmark"
PAUSE_S = 5.0
"""Time between two pages of a reader."""


def login_settings() -> dict[str, str]:
    """Return the environment variables of a dashboard that these clients may log in to."""
    return {"PAYREADY_DASHBOARD_USERS": f"{USER}:operator:{hash_password(PASSWORD)}"}


def log_in(client: httpx.Client) -> None:
    """Log in with the form of the login page."""
    form = client.get("/login").raise_for_status().text
    hidden = dict(re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)"', form))
    response = client.post("/login", data={**hidden, "name": USER, "password": PASSWORD})
    if response.status_code != httpx.codes.SEE_OTHER:
        raise RuntimeError(f"the login failed with status {response.status_code}")
    if not client.cookies:
        raise RuntimeError("the login set no cookie")


@contextmanager
def readers(url: str, count: int, paths: Sequence[str]) -> Iterator[None]:
    """Run readers for the duration of the block. Each follows the page Now, and reads one page every 5 s."""
    stop = threading.Event()
    with ExitStack() as stack:
        threads = []
        for _ in range(count):
            client = stack.enter_context(httpx.Client(base_url=url, timeout=30))
            log_in(client)
            threads += [
                threading.Thread(target=_follow_events, args=(client, stop), daemon=True),
                threading.Thread(target=_read_pages, args=(client, stop, paths), daemon=True),
            ]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            stop.set()
            for thread in threads:
                thread.join()


def _follow_events(client: httpx.Client, stop: threading.Event) -> None:
    while not stop.is_set():
        with client.stream("GET", "/now/events") as response:
            response.raise_for_status()
            for _ in response.iter_lines():
                if stop.is_set():
                    return


def _read_pages(client: httpx.Client, stop: threading.Event, paths: Sequence[str]) -> None:
    while True:
        for path in paths:
            client.get(path).raise_for_status()
            if stop.wait(PAUSE_S):
                return
