"""Logins, sessions and logouts, as a browser and as an attacker see them."""

import hashlib
import itertools
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from http.client import HTTPConnection
from pathlib import Path

import httpx
import pytest
from redis import Redis
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from dashboard.access import access_control, password_hashes
from dashboard.access.access_control import MAX_UNFINISHED_LOGINS
from dashboard.application import build_app
from dashboard.page_requests import operator_form
from tests.dashboard.conftest import (
    PASSWORD,
    PASSWORD_HASH,
    csrf_token_in,
    logged_in,
    runtime_with,
    serve,
)
from worker.correlation.dashboard_logins import AGE_LIMIT, IDLE_LIMIT, LOCKOUT
from worker.runtime import Runtime

pytestmark = [
    pytest.mark.slow,
    pytest.mark.parametrize("databases", ["sqlite"], indirect=True),
]  # the ledger plays no part
COOKIE = "payready_session"
WRONG, LOCKED_OUT = "the name or the password is wrong", "too many failed attempts; try again in 15 minutes"


def log_in(client: httpx.Client, name: str = "olivia", password: str = PASSWORD, **more: str) -> httpx.Response:
    return client.post("/login", data={"name": name, "password": password, **more})


def is_logged_in(client: httpx.Client) -> bool:
    return client.get("/").status_code == 200


def keys_of(runtime: Runtime) -> dict[str, str]:
    """Return the dashboard's keys in Redis, with their values."""
    with Redis.from_url(runtime.settings.redis_url, decode_responses=True) as redis:
        names = redis.scan_iter(f"{runtime.settings.name_prefix}payready:dashboard:*", count=1000)
        return {name: str(redis.get(name)) for name in names}


@contextmanager
def redis_of(runtime: Runtime) -> Iterator[Redis]:
    with Redis.from_url(runtime.settings.redis_url, decode_responses=True) as redis:
        yield redis


# --- requests without a session ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "location"),
    [
        ("/", "/login"),
        ("/audit?user=a&subject=b%26c", "/login?next=%2Faudit%3Fuser%3Da%26subject%3Db%2526c"),
        ("/nowhere/%2e%2e%2f", "/login?next=%2Fnowhere%2F%252e%252e%252f"),
        ("//evil.example/", "/login"),
        ("/static", "/login?next=%2Fstatic"),
        ("/loginx", "/login?next=%2Floginx"),
    ],
)
def test_request_without_a_session_gets_the_login(anonymous: httpx.Client, path: str, location: str) -> None:
    """An unknown page too: which pages exist is not public. The host of the request is not in the answer."""
    request = anonymous.build_request("GET", "/", headers={"Host": "evil.example"})
    request.url = request.url.copy_with(raw_path=path.encode())
    response = anonymous.send(request)
    assert (response.status_code, response.headers["location"]) == (303, location)


def test_event_stream_without_a_session_is_refused(anonymous: httpx.Client) -> None:
    """A redirect would make the browser connect again and again."""
    assert anonymous.get("/", headers={"Accept": "text/event-stream"}).status_code == 401


def test_form_without_a_session_gets_the_login(anonymous: httpx.Client) -> None:
    response = anonymous.post("/logout", data={"csrf_token": ""})
    assert (response.status_code, response.headers["location"]) == (303, "/login")


@pytest.mark.parametrize("path", ["/login", "/healthz", "/readyz", "/static/style.css"])
def test_public_page_needs_no_session(anonymous: httpx.Client, path: str) -> None:
    assert anonymous.get(path).status_code == 200


@pytest.mark.parametrize("path", ["../application.py", "%2e%2e/application.py", "..%2fapplication.py", "", "."])
def test_static_folder_gives_no_other_file(dashboard_url: str, path: str) -> None:
    """Httpx would remove the dots."""
    connection = HTTPConnection(dashboard_url.removeprefix("http://"))
    connection.request("GET", f"/static/{path}")
    assert connection.getresponse().status == 404
    connection.close()


# --- the login --------------------------------------------------------------------------------------------------------


def test_login_begins_a_session_and_shows_the_page_of_next(anonymous: httpx.Client) -> None:
    html = anonymous.get("/login", params={"next": "/audit?user=a"}).text
    assert 'name="next" value="/audit?user=a"' in html
    response = log_in(anonymous, next="/audit?user=a")
    assert (response.status_code, response.headers["location"]) == (303, "/audit?user=a")
    assert re.fullmatch(
        rf"{COOKIE}=[\w-]{{43}}; HttpOnly; Max-Age=28800; Path=/; SameSite=lax", response.headers["set-cookie"]
    )
    assert "olivia (operator)" in anonymous.get("/").text


def test_cookie_of_production_is_bound_to_the_host_and_to_tls(runtime: Runtime) -> None:
    with serve(build_app(runtime_with(runtime, env="production"))) as url, httpx.Client(base_url=url) as client:
        response = log_in(client)
        assert re.fullmatch(
            r"__Host-payready_session=[\w-]{43}; HttpOnly; Max-Age=28800; Path=/; SameSite=lax; Secure",
            response.headers["set-cookie"],
        )
        assert response.headers["strict-transport-security"] == "max-age=31536000"


@pytest.mark.parametrize(
    "target",
    [
        "https://evil.example/",
        "//evil.example/",
        "/.//evil.example/",
        "/login/..//evil.example/",
        "/\\evil.example/",
        "\\\\evil.example",
        "/\t/evil.example/",
        "/\n/evil.example/",
        "javascript:alert(1)",
        "evil.example",
        "/\u2215evil.example",
        "/login",
        "/login?next=/login",
        "",
    ],
)
def test_login_leads_to_no_other_site(anonymous: httpx.Client, target: str) -> None:
    assert 'name="next" value="/"' in anonymous.get("/login", params={"next": target}).text
    assert log_in(anonymous, next=target).headers["location"] == "/"


@pytest.mark.parametrize(
    ("name", "password"),
    [
        ("olivia", "wrong"),
        ("olivia", ""),
        ("olivia", PASSWORD_HASH),
        ("unknown", PASSWORD),
        ("", ""),
        ("OLIVIA", PASSWORD),
        ("olivia\x00", PASSWORD),
        ("*", PASSWORD),
        ("-", "-"),
        ("o" * 3000, "p" * 3000),
    ],
)
def test_wrong_name_or_password_gets_the_same_answer(anonymous: httpx.Client, name: str, password: str) -> None:
    response = log_in(anonymous, name, password, next="/audit")
    assert response.status_code == 401
    assert WRONG in response.text
    assert 'value="/audit"' in response.text
    assert "set-cookie" not in response.headers
    assert not is_logged_in(anonymous)


def test_unknown_name_costs_one_verification_as_a_known_one(
    anonymous: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the time of an answer says which names exist. The password of another user helps no user."""
    verified: list[str] = []

    def verify(password_hash: str, password: str) -> bool:
        verified.append(password_hash)
        return password_hashes.verify_password(password_hash, password)

    monkeypatch.setattr(access_control, "verify_password", verify)
    for name in ("olivia", "unknown", "olivia\x00", ""):
        verified.clear()
        assert log_in(anonymous, name, "wrong").status_code == 401
        assert verified == [PASSWORD_HASH]
        if name != "olivia":
            assert log_in(anonymous, name, PASSWORD).status_code == 401


@pytest.mark.parametrize("fields", [{}, {"name": "olivia"}, {"password": PASSWORD}])
def test_login_without_a_field_is_refused_with_a_sentence(anonymous: httpx.Client, fields: dict[str, str]) -> None:
    response = anonymous.post("/login", data=fields)
    assert response.status_code == 400
    assert "must have a name and a password" in response.text


def test_login_accepts_no_file(anonymous: httpx.Client) -> None:
    response = anonymous.post("/login", data={"name": "olivia"}, files={"password": ("a.txt", PASSWORD.encode())})
    assert response.status_code == 400


def test_login_form_of_another_site_is_refused(anonymous: httpx.Client) -> None:
    """It would log the victim in as the attacker."""
    for site in ("cross-site", "same-site"):
        response = anonymous.post(
            "/login", data={"name": "olivia", "password": PASSWORD}, headers={"Sec-Fetch-Site": site}
        )
        assert response.status_code == 403
    assert not is_logged_in(anonymous)


@pytest.mark.parametrize("has_length", [True, False])
def test_large_login_is_refused(anonymous: httpx.Client, *, has_length: bool) -> None:
    body = b"name=olivia&password=" + b"a" * 20_000
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    response = anonymous.post("/login", content=body if has_length else iter([body]), headers=headers)
    assert response.status_code == 413
    assert "16 KiB" in response.text


# --- sessions ---------------------------------------------------------------------------------------------------------


def test_redis_knows_no_token(anonymous: httpx.Client, runtime: Runtime) -> None:
    log_in(anonymous)
    token = anonymous.cookies[COOKIE]
    [(key, value)] = [(key, value) for key, value in keys_of(runtime).items() if ":session:" in key]
    assert token not in key + value
    assert key.endswith(hashlib.sha256(token.encode()).hexdigest())
    assert PASSWORD_HASH not in value


def test_login_does_not_keep_an_earlier_token(anonymous: httpx.Client) -> None:
    """Session fixation: an attacker that has planted a cookie does not get the session."""
    planted = "A" * 43
    anonymous.cookies.set(COOKIE, planted)
    log_in(anonymous)
    tokens = [cookie.value for cookie in anonymous.cookies.jar if cookie.value != planted]
    assert len(tokens) == 1
    with httpx.Client(base_url=anonymous.base_url, cookies={COOKIE: planted}) as attacker:
        assert not is_logged_in(attacker)


def test_second_login_ends_the_first_session(anonymous: httpx.Client) -> None:
    log_in(anonymous)
    first = anonymous.cookies[COOKIE]
    log_in(anonymous)
    assert anonymous.cookies[COOKIE] != first
    with httpx.Client(base_url=anonymous.base_url, cookies={COOKIE: first}) as earlier:
        assert not is_logged_in(earlier)


@pytest.mark.parametrize("token", ["", "x", "A" * 43, "A" * 5000, "../../etc", "*", "%00", '"; DROP'])
def test_invented_token_is_no_session(anonymous: httpx.Client, token: str) -> None:
    response = anonymous.get("/", headers={"Cookie": f"{COOKIE}={token}"})
    assert response.status_code == 303


def test_request_extends_a_session_and_an_event_stream_does_not(operator: httpx.Client, runtime: Runtime) -> None:
    """A page that is open without a reader must not keep its session alive."""
    [key] = [key for key in keys_of(runtime) if ":session:" in key]
    with redis_of(runtime) as redis:
        redis.expire(key, 60)
        operator.get("/", headers={"Accept": "text/event-stream"})
        assert 0 < int(str(redis.ttl(key))) <= 60
        operator.get("/")
        assert 60 < int(str(redis.ttl(key))) <= IDLE_LIMIT.total_seconds()


def test_session_ends_at_its_age_limit_although_it_is_used(runtime: Runtime) -> None:
    now = [runtime.clock()]
    with serve(build_app(replace(runtime, clock=lambda: now[0]))) as url, logged_in(url, "olivia") as client:
        now[0] += AGE_LIMIT - timedelta(seconds=1)
        assert is_logged_in(client)
        now[0] += timedelta(seconds=1)
        assert not is_logged_in(client)
        assert [key for key in keys_of(runtime) if ":session:" in key] == []


def test_logout_ends_the_session_in_redis(operator: httpx.Client, runtime: Runtime) -> None:
    """A copy of the cookie is worth nothing after it."""
    token = operator.cookies[COOKIE]
    response = operator.post("/logout", data={"csrf_token": csrf_token_in(operator.get("/").text)})
    assert (response.status_code, response.headers["location"]) == (303, "/login")
    assert 'payready_session=""' in response.headers["set-cookie"]
    assert [key for key in keys_of(runtime) if ":session:" in key] == []
    with httpx.Client(base_url=operator.base_url, cookies={COOKIE: token}) as copy:
        assert not is_logged_in(copy)


def test_changed_users_file_has_effect_at_the_next_request(runtime: Runtime, tmp_path: Path) -> None:
    """A role, a password, and a removed user. A mistake in the file keeps the earlier users."""
    file = tmp_path / "users"
    file.write_text(f"# the users\n\nfrida:operator:{PASSWORD_HASH}\n")
    changed = runtime_with(runtime, dashboard_users_file=file)
    other_hash = password_hashes.hash_password("another password")
    with serve(build_app(changed)) as url, logged_in(url, "frida") as client, logged_in(url, "olivia") as olivia:
        file.write_text(f"frida:viewer:{PASSWORD_HASH}\n")
        assert "frida (viewer)" in client.get("/").text
        file.write_text("frida:admin:x\n")
        assert "frida (viewer)" in client.get("/").text
        file.write_text(f"frida:viewer:{other_hash}\n")
        assert not is_logged_in(client), "the session has the earlier password"
        file.write_text(f"frida:viewer:{PASSWORD_HASH}\n")
        assert is_logged_in(client)
        file.write_text("# no user\n")
        assert not is_logged_in(client)
        assert is_logged_in(olivia)


def test_other_deployment_on_the_same_redis_has_other_sessions(operator: httpx.Client, runtime: Runtime) -> None:
    other = runtime_with(runtime, instance="other")
    cookies = {COOKIE: operator.cookies[COOKIE]}
    with serve(build_app(other)) as url, httpx.Client(base_url=url, cookies=cookies) as client:
        assert not is_logged_in(client)


# --- lockout ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["olivia", "unknown"])
def test_name_is_locked_out_after_five_failures(anonymous: httpx.Client, runtime: Runtime, name: str) -> None:
    """An unknown name too, and the right password does not help. Other names are not affected."""
    assert [log_in(anonymous, name, "wrong").status_code for _ in range(6)] == [401] * 5 + [429]
    refused = log_in(anonymous, name)
    assert refused.status_code == 429
    assert LOCKED_OUT in refused.text
    assert log_in(anonymous, "victor").status_code == 303
    with redis_of(runtime) as redis:
        lockouts = [int(str(redis.ttl(key))) for key in keys_of(runtime) if ":attempts:name:" in key]
        assert max(lockouts) <= LOCKOUT.total_seconds()
        assert min(lockouts) > LOCKOUT.total_seconds() - 60


def test_refused_attempts_do_not_extend_a_lockout(anonymous: httpx.Client, runtime: Runtime) -> None:
    for _ in range(5):
        log_in(anonymous, "olivia", "wrong")
    with redis_of(runtime) as redis:
        [key] = [key for key in keys_of(runtime) if ":attempts:name:" in key]
        redis.expire(key, 100)
        assert log_in(anonymous).status_code == 429
        assert int(str(redis.ttl(key))) <= 100
        redis.delete(key)
    assert log_in(anonymous).status_code == 303


def test_success_forgives_the_failures_of_its_name(anonymous: httpx.Client) -> None:
    for _ in range(4):
        for _ in range(4):
            log_in(anonymous, "olivia", "wrong")
        assert log_in(anonymous).status_code == 303


def test_attempts_at_the_same_moment_cannot_pass_together(dashboard_url: str) -> None:
    barrier = threading.Barrier(12)

    def guess(_: int) -> int:
        with httpx.Client(base_url=dashboard_url, timeout=30) as client:
            barrier.wait()
            return log_in(client, "olivia", "wrong").status_code

    with ThreadPoolExecutor(12) as threads:
        answers = list(threads.map(guess, range(12)))
    assert answers.count(401) <= 5
    assert set(answers) <= {401, 429, 503}


def test_address_is_locked_out_after_twenty_failures_of_any_names(anonymous: httpx.Client) -> None:
    """Successes of another user in between do not help."""
    answers = [log_in(anonymous, f"name{number}", "wrong").status_code for number in range(10)]
    assert log_in(anonymous, "victor").status_code == 303
    answers += [log_in(anonymous, f"name{number}", "wrong").status_code for number in range(10, 21)]
    assert answers == [401] * 20 + [429]
    assert log_in(anonymous).status_code == 429


def test_invented_client_addresses_do_not_evade_the_lockout(runtime: Runtime) -> None:
    """A proxy appends the client's address. What the client wrote before it does not count."""
    with serve(build_app(runtime)) as url, httpx.Client(base_url=url) as client:
        for number in range(20):
            client.headers["X-Forwarded-For"] = f"10.9.8.{number}, 203.0.113.7"
            assert log_in(client, f"name{number}", "wrong").status_code == 401
        assert log_in(client, "olivia").status_code == 429
        client.headers["X-Forwarded-For"] = "203.0.113.8"
        assert log_in(client, "olivia").status_code == 303


def test_client_of_an_unknown_proxy_cannot_choose_its_address(runtime: Runtime) -> None:
    changed = runtime_with(runtime, dashboard_proxy_addresses=())
    with serve(build_app(changed)) as url, httpx.Client(base_url=url) as client:
        for number in range(20):
            client.headers["X-Forwarded-For"] = f"203.0.113.{number}"
            log_in(client, f"name{number}", "wrong")
        assert log_in(client, "olivia").status_code == 429


def test_ipv6_client_cannot_use_each_address_of_its_network(runtime: Runtime) -> None:
    with serve(build_app(runtime)) as url, httpx.Client(base_url=url) as client:
        for number in range(20):
            client.headers["X-Forwarded-For"] = f"2001:db8::{number:x}:1"
            log_in(client, f"name{number}", "wrong")
        client.headers["X-Forwarded-For"] = "2001:db8::ffff:1"
        assert log_in(client, "olivia").status_code == 429
        client.headers["X-Forwarded-For"] = "2001:db8:0:1::1"
        assert log_in(client, "olivia").status_code == 303


def test_many_logins_at_once_cost_a_bounded_number_of_verifications(
    dashboard_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One is verified, seven wait, and further ones are refused at once."""
    release, running, most = threading.Event(), itertools.count(), []

    def verify(_hash: str, _password: str) -> bool:
        most.append(next(running))
        release.wait(20)
        return False

    monkeypatch.setattr(access_control, "verify_password", verify)
    with ThreadPoolExecutor(16) as threads, httpx.Client(base_url=dashboard_url, timeout=30) as client:
        waiting = [threads.submit(log_in, client, f"name{number}", "wrong") for number in range(12)]
        refused = list(itertools.islice(as_completed(waiting), 12 - MAX_UNFINISHED_LOGINS))
        assert {each.result().status_code for each in refused} == {503}
        assert len(most) <= 1
        assert client.get("/healthz").status_code == 200
        release.set()
        answers = [each.result().status_code for each in waiting]
        assert answers.count(401) == MAX_UNFINISHED_LOGINS


# --- forms ------------------------------------------------------------------------------------------------------------


async def _act(request: Request) -> Response:
    await operator_form(request)
    return PlainTextResponse("done")


@pytest.fixture
def url_with_action(runtime: Runtime) -> Iterator[str]:
    """The URL of a dashboard with an action, `/act`."""
    app = build_app(runtime)
    app.router.routes.append(Route("/act", _act, methods=["POST"]))
    with serve(app) as url:
        yield url


def test_action_needs_an_operator_and_the_token_of_its_session(url_with_action: str) -> None:
    with logged_in(url_with_action, "olivia") as operator, logged_in(url_with_action, "victor") as viewer:
        own, others = (csrf_token_in(client.get("/").text) for client in (operator, viewer))
        assert operator.post("/act", data={"csrf_token": own}).text == "done"
        for token in ("", others, "0" * 64, own.upper(), own[:-1], "ü"):
            response = operator.post("/act", data={"csrf_token": token})
            assert response.status_code == 403, token
            assert "of another session" in response.text
        assert operator.post("/act").status_code == 403
        assert viewer.post("/act", data={"csrf_token": others}).status_code == 403
        with httpx.Client(base_url=url_with_action) as stranger:
            assert stranger.post("/act", data={"csrf_token": own}).status_code == 303


def test_action_of_another_site_is_refused_although_its_token_is_right(url_with_action: str) -> None:
    with logged_in(url_with_action, "olivia") as operator:
        token = csrf_token_in(operator.get("/").text)
        response = operator.post("/act", data={"csrf_token": token}, headers={"Sec-Fetch-Site": "cross-site"})
        assert response.status_code == 403


def test_token_of_forms_does_not_reveal_the_session(operator: httpx.Client) -> None:
    html = operator.get("/").text
    assert operator.cookies[COOKIE] not in html


def test_large_form_is_refused(url_with_action: str) -> None:
    with logged_in(url_with_action, "olivia") as operator:
        response = operator.post("/act", data={"csrf_token": "a" * 70_000})
        assert response.status_code == 413
        files = {"file": ("a.csv", b"a" * 70_000)}
        assert operator.post("/act", data={"csrf_token": "a"}, files=files).status_code == 413


def test_viewer_cannot_log_out_an_operator(operator: httpx.Client, viewer: httpx.Client) -> None:
    response = operator.post("/logout", data={"csrf_token": csrf_token_in(viewer.get("/").text)})
    assert response.status_code == 403
    assert is_logged_in(operator)


# --- dependencies -----------------------------------------------------------------------------------------------------


def test_dashboard_without_redis_says_so(runtime: Runtime) -> None:
    away = runtime_with(runtime, redis_url="redis://127.0.0.1:1/0")
    with serve(build_app(away)) as url, httpx.Client(base_url=url, cookies={COOKIE: "A" * 43}) as client:
        for response in (client.get("/"), log_in(client)):
            assert response.status_code == 503
            assert "Redis is unavailable" in response.text
        assert client.get("/healthz").status_code == 200
        assert client.get("/readyz").text == "not ready: Redis is unavailable"
