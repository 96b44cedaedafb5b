"""A dashboard on real stores, served over HTTP, and clients that are logged in."""

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from uuid import uuid4

import httpx
import pytest
import uvicorn
from pydantic import SecretStr
from starlette.types import ASGIApp

from config.settings import Settings
from dashboard.__main__ import SERVER
from dashboard.application import build_app
from tests.support.databases import Databases
from worker.runtime import Runtime, build_runtime

PASSWORD = "a password of the tests"
PASSWORD_HASH = "$argon2id$v=19$m=19456,t=1,p=1$NLncksWzP19CvUeGgZHiIA$ZoopEBRAs9g44+bW9qpVA6hqIUWDYFYxjayHJMrHfz4"
"""As cheap as the dashboard accepts: most tests log in."""
USERS = f"olivia:operator:{PASSWORD_HASH} victor:viewer:{PASSWORD_HASH}"


@pytest.fixture
def runtime(databases: Databases, valkey_url: str) -> Iterator[Runtime]:
    """A runtime on an empty ledger. Each has an instance of its own, so that failed logins are not shared."""
    with databases.create() as database_url:
        chosen = Settings(
            database_url=database_url,
            redis_url=valkey_url,
            dashboard_users=SecretStr(USERS),
            instance=f"test-{uuid4().hex[:8]}",
        )
        built = build_runtime(chosen)
        yield built
        built.engine.dispose()


def runtime_with(runtime: Runtime, **changed: Any) -> Runtime:
    """Return a runtime with other settings on the same stores."""
    return replace(runtime, settings=runtime.settings.model_copy(update=changed))


@pytest.fixture
def dashboard_url(runtime: Runtime) -> Iterator[str]:
    """The URL of a dashboard on the runtime."""
    with serve(build_app(runtime)) as url:
        yield url


@pytest.fixture
def operator(dashboard_url: str) -> Iterator[httpx.Client]:
    """A client with the session of an operator. Its `get` and `post` take paths."""
    with logged_in(dashboard_url, "olivia") as client:
        yield client


@pytest.fixture
def viewer(dashboard_url: str) -> Iterator[httpx.Client]:
    """A client with the session of a viewer."""
    with logged_in(dashboard_url, "victor") as client:
        yield client


@pytest.fixture
def anonymous(dashboard_url: str) -> Iterator[httpx.Client]:
    """A client without a session."""
    with httpx.Client(base_url=dashboard_url) as client:
        yield client


@contextmanager
def logged_in(dashboard_url: str, name: str, password: str = PASSWORD) -> Iterator[httpx.Client]:
    """Yield a client that has logged in."""
    with httpx.Client(base_url=dashboard_url) as client:
        response = client.post("/login", data={"name": name, "password": password})
        assert response.status_code == 303, response.text
        yield client


def csrf_token_in(html: str) -> str:
    """Return the token of the forms of a page."""
    [token, *_] = re.findall(r'name="csrf_token" value="([0-9a-f]{64})"', html)
    return str(token)


@contextmanager
def serve(app: ASGIApp) -> Iterator[str]:
    """Serve an application as the role does, on a free port until the block ends. Yield its URL."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, **SERVER))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.005)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
