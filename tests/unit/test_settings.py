"""Settings: the agreed names, and one clear sentence for each error."""

import os
import ssl
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from kombu.transport.redis import Channel

from config.celery_config import celery_settings
from config.settings import (
    RECORD_BUDGET_S,
    ConfigurationError,
    load_rejecting_unknown,
    require_usable_platform_port,
)
from demo.processes import ROOT, procfile
from worker.flow.calling import MAX_CLAIM_AGE, RECORD_RETRY_DELAYS_S

PRODUCTION = {
    "PAYREADY_ENV": "production",
    "PAYREADY_QUILTT_API_KEY": "qk_real",
    "PAYREADY_WEBHOOK_SECRETS": "whsec_of_this_year, whsec_of_last_year",
    "PAYREADY_PRICE_LIST_FILE": "/prices/price_list.toml",
}


def test_empty_environment_is_a_development_deployment() -> None:
    """It starts, and rejects every webhook because it has no secret."""
    settings = load_rejecting_unknown({})
    assert (settings.env, settings.webhook_secrets) == ("development", ())
    assert settings.quiltt_api_url == "https://api.quiltt.io"
    assert settings.quiltt_auth_url == "https://auth.quiltt.io"


def test_load_reads_each_agreed_name() -> None:
    """The names are a contract with deployments."""
    settings = load_rejecting_unknown(
        {
            **PRODUCTION,
            "PAYREADY_REDIS_URL": "redis://r/1",
            "PAYREADY_DATABASE_URL": "postgresql://d/e",
            "PAYREADY_QUILTT_API_URL": "https://api",
            "PAYREADY_QUILTT_AUTH_URL": "https://auth",
            "PAYREADY_WEBHOOK_HOST": "0.0.0.0",
            "PAYREADY_WEBHOOK_PORT": "8080",
            "HOME": "/x",
        }
    )
    assert settings.env == "production"
    assert (settings.redis_url, settings.database_url) == ("redis://r/1", "postgresql://d/e")
    assert (settings.quiltt_api_url, settings.quiltt_auth_url) == ("https://api", "https://auth")
    assert settings.quiltt_api_key.get_secret_value() == "qk_real"
    assert [secret.get_secret_value() for secret in settings.webhook_secrets] == [
        "whsec_of_this_year",
        "whsec_of_last_year",
    ]
    assert (settings.webhook_host, settings.webhook_port) == ("0.0.0.0", 8080)


def test_broker_and_result_backend_default_to_redis() -> None:
    """Each has its own setting."""
    settings = load_rejecting_unknown({"PAYREADY_REDIS_URL": "redis://r/1"})
    assert (settings.effective_broker_url, settings.effective_result_backend_url) == ("redis://r/1", "redis://r/1")
    settings = load_rejecting_unknown({"PAYREADY_REDIS_URL": "redis://r/1", "PAYREADY_BROKER_URL": "amqp://b"})
    assert (settings.effective_broker_url, settings.effective_result_backend_url) == ("amqp://b", "redis://r/1")
    settings = load_rejecting_unknown({"PAYREADY_REDIS_URL": "redis://r/1", "PAYREADY_RESULT_BACKEND_URL": "redis://q"})
    assert (settings.effective_broker_url, settings.effective_result_backend_url) == ("redis://r/1", "redis://q")


def test_empty_variable_counts_as_unset() -> None:
    """Compose files pass empty variables."""
    assert load_rejecting_unknown({"PAYREADY_WEBHOOK_PORT": ""}) == load_rejecting_unknown({})


def test_port_of_the_platform_is_the_default_of_the_webhook_port() -> None:
    """Heroku and other platforms state it as `PORT`."""
    assert load_rejecting_unknown({"PORT": "5000"}).webhook_port == 5000
    assert load_rejecting_unknown({"PORT": "5000", "PAYREADY_WEBHOOK_PORT": ""}).webhook_port == 5000
    assert load_rejecting_unknown({"PORT": "5000", "PAYREADY_WEBHOOK_PORT": "8001"}).webhook_port == 8001
    assert load_rejecting_unknown({"PORT": "x", "PAYREADY_WEBHOOK_PORT": "8001"}).webhook_port == 8001
    assert load_rejecting_unknown({"PORT": ""}).webhook_port == 8000


@pytest.mark.parametrize("port", ["http", "65536", "-1", "8000\n1", "\u0661"])
def test_only_web_refuses_an_unusable_port_of_the_platform(port: str) -> None:
    """Other roles do not read it."""
    assert load_rejecting_unknown({"PORT": port}).webhook_port == 8000
    with pytest.raises(ConfigurationError, match=r"^PORT: must be a number from 0 to 65535$"):
        require_usable_platform_port({"PORT": port})
    require_usable_platform_port({"PORT": port, "PAYREADY_WEBHOOK_PORT": "8001"})
    require_usable_platform_port({"PORT": " 5000\n"})


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "[::1]", "localhost"])
def test_production_accepts_http_on_loopback(host: str) -> None:
    """For a stub of Quiltt on this machine."""
    url = f"http://{host}:8080/quiltt"
    environ = {**PRODUCTION, "PAYREADY_QUILTT_API_URL": url, "PAYREADY_QUILTT_AUTH_URL": url}
    assert load_rejecting_unknown(environ).quiltt_api_url == url


def test_tunnel_of_a_proxy_counts_in_the_call_duration() -> None:
    """Maintenance must not consider a call lost that still waits for its tunnel."""
    settings = load_rejecting_unknown({"PAYREADY_QUILTT_PROXY_URL": "http://proxy:3128"})
    assert settings.max_call_duration == timedelta(seconds=7 * 5 + 20)


def test_call_and_record_duration_leaves_time_for_all_retries() -> None:
    """Maintenance must not consider a call lost whose result is still being recorded."""
    assert sum(RECORD_RETRY_DELAYS_S) < RECORD_BUDGET_S
    settings = load_rejecting_unknown({})
    assert settings.max_call_duration == timedelta(seconds=4 * 5 + 20)
    margin = settings.max_call_and_record_duration - settings.max_call_duration
    assert margin == MAX_CLAIM_AGE + timedelta(seconds=RECORD_BUDGET_S)


@pytest.mark.parametrize(
    ("environ", "modes"),
    [
        ({}, {"TEST", "SANDBOX"}),
        ({"PAYREADY_ALLOW_PRODUCTION_KEY": "1"}, {"TEST", "SANDBOX", "PRODUCTION"}),
        (PRODUCTION, {"TEST", "SANDBOX", "PRODUCTION"}),
    ],
)
def test_development_permits_no_production_key(environ: dict[str, str], modes: set[str]) -> None:
    settings = load_rejecting_unknown(environ)
    assert {mode for mode in ("TEST", "SANDBOX", "PRODUCTION") if settings.permits_api_key_mode(mode)} == modes


def test_settings_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_rejecting_unknown({}).webhook_port = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("environ", "options"),
    [
        ({}, {"priority_steps": [0, 3, 6, 9], "sep": "\x06\x16", "global_keyprefix": ""}),
        ({"PAYREADY_BROKER_PRIORITY_STEPS": "0, 5,9"}, {"priority_steps": [0, 5, 9]}),
        ({"PAYREADY_BROKER_PRIORITY_SEPARATOR": ":"}, {"sep": ":"}),
        ({"PAYREADY_BROKER_KEY_PREFIX": "{svc}:"}, {"global_keyprefix": "{svc}:"}),
    ],
    ids=str,
)
def test_broker_options_are_those_of_kombu(environ: dict[str, str], options: dict[str, Any]) -> None:
    """By default they are kombu's own defaults."""
    transport = celery_settings(load_rejecting_unknown(environ))["broker_transport_options"]
    assert options.items() <= transport.items()
    if not environ:
        assert options == {name: getattr(Channel, name) for name in options}


INVALID = [
    (
        {"PAYREADY_PROT": "1"},
        "PAYREADY_PROT is not a setting of payready; docs/reference/configuration.md lists the settings",
    ),
    ({"PAYREADY_": "1"}, "PAYREADY_ is not a setting"),
    ({"PAYREADY_ENV": "staging"}, "PAYREADY_ENV: Input should be 'development' or 'production'"),
    ({"PAYREADY_WEBHOOK_PORT": "http"}, "PAYREADY_WEBHOOK_PORT: "),
    ({"PAYREADY_WEBHOOK_PORT": "65536"}, "PAYREADY_WEBHOOK_PORT: "),
    ({"PAYREADY_CURRENCY": "usd"}, "PAYREADY_CURRENCY: "),
    *(
        ({"PAYREADY_BROKER_PRIORITY_STEPS": steps}, "PAYREADY_BROKER_PRIORITY_STEPS: must be ascending numbers")
        for steps in ("3,6", "0,6,3", "0,3,3", "0,10", ",", "-1,0")
    ),
    ({"PAYREADY_BROKER_PRIORITY_STEPS": "0,x"}, "PAYREADY_BROKER_PRIORITY_STEPS: "),
    *(
        ({"PAYREADY_BROKER_PRIORITY_SEPARATOR": separator}, "PAYREADY_BROKER_PRIORITY_SEPARATOR: must have a character")
        for separator in (": :", "\\x06\\x16", "m", "-", "3", ".")
    ),
    *(({"PAYREADY_BROKER_KEY_PREFIX": prefix}, "PAYREADY_BROKER_KEY_PREFIX: ") for prefix in ("s vc:", "svc\\n:")),
    ({"PAYREADY_RESULT_KEY_PREFIX": "a b"}, "PAYREADY_RESULT_KEY_PREFIX: "),
    *(
        ({"PAYREADY_INSTANCE": name}, "PAYREADY_INSTANCE: must be 1 to 32 characters of a-z, 0-9 and -, such as live")
        for name in ("Live", "live.eu", "live_eu", "x" * 33)
    ),
    ({"PAYREADY_VISIBILITY_TIMEOUT_S": "40"}, "PAYREADY_VISIBILITY_TIMEOUT_S must be longer than 40 s"),
    ({"PAYREADY_QUILTT_CONNECT_TIMEOUT_S": "30"}, "PAYREADY_VISIBILITY_TIMEOUT_S must be longer than 140 s"),
    ({"PAYREADY_QUILTT_API_URL": "api.quiltt.io"}, "PAYREADY_QUILTT_API_URL: String should match"),
    ({"PAYREADY_QUILTT_AUTH_URL": "https://auth.quiltt.io?v=1"}, "PAYREADY_QUILTT_AUTH_URL: String should match"),
    *(
        ({"PAYREADY_QUILTT_API_URL": url}, "PAYREADY_QUILTT_API_URL: must have a host, and a port from 1 to 65535")
        for url in ("https://:8080", "https://api:0", "https://api:65536", "https://api:x", "https://[api")
    ),
    ({"PAYREADY_QUILTT_PROXY_URL": "proxy:3128"}, "PAYREADY_QUILTT_PROXY_URL: String should match"),
    ({"PAYREADY_QUILTT_PROXY_URL": "socks5://proxy:1080"}, "PAYREADY_QUILTT_PROXY_URL: String should match"),
    ({"PAYREADY_QUILTT_PROXY_URL": "http://proxy:3128/x"}, "PAYREADY_QUILTT_PROXY_URL: must have no path: write http"),
    *(
        (
            {"PAYREADY_QUILTT_PROXY_URL": "http://proxy:3128", name: "http://127.0.0.1:1"},
            f"{name} must begin with https:// to be reached through a proxy",
        )
        for name in ("PAYREADY_QUILTT_API_URL", "PAYREADY_QUILTT_AUTH_URL")
    ),
    *(
        (
            {"PAYREADY_QUILTT_CA_FILE": file},
            "PAYREADY_QUILTT_CA_FILE: must name a readable file with certificates in PEM",
        )
        for file in ("/nowhere/at/all.pem", __file__, str(ROOT))
    ),
    (
        {**PRODUCTION, "PAYREADY_QUILTT_API_URL": "http://api"},
        "PAYREADY_QUILTT_API_URL must begin with https:// in prod",
    ),
    (
        {**PRODUCTION, "PAYREADY_QUILTT_AUTH_URL": "http://10.0.0.1"},
        "PAYREADY_QUILTT_AUTH_URL must begin with https:// ",
    ),
    *(
        (
            {**PRODUCTION, "PAYREADY_WEBHOOK_SECRETS": secrets},
            "PAYREADY_WEBHOOK_SECRETS must have at least 16 characters",
        )
        for secrets in ("x", "fifteen_chars_x", "sixteen_chars_xx,short")
    ),
    ({**PRODUCTION, "PAYREADY_QUILTT_API_KEY": "demo-api-key"}, "PAYREADY_QUILTT_API_KEY must be set in production"),
    (
        {**PRODUCTION, "PAYREADY_WEBHOOK_SECRETS": "sixteen_chars_xx,demo-x"},
        "PAYREADY_WEBHOOK_SECRETS must be set in production, and not to a demo value",
    ),
    ({**PRODUCTION, "PAYREADY_PRICE_LIST_FILE": ""}, "PAYREADY_PRICE_LIST_FILE must be set in production"),
    (
        {**PRODUCTION, "PAYREADY_PRICE_LIST_FILE": os.path.relpath(ROOT / "config" / "price_list.toml")},
        "PAYREADY_PRICE_LIST_FILE must be set in production",
    ),
]


@pytest.mark.parametrize(("environ", "sentence"), INVALID, ids=lambda value: str(value)[-40:])
def test_error_is_one_sentence(environ: dict[str, str], sentence: str) -> None:
    """The sentence has the name of the variable, and not its value."""
    with pytest.raises(ConfigurationError) as error_info:
        load_rejecting_unknown(environ)
    assert str(error_info.value).startswith(sentence)
    assert "\n" not in str(error_info.value)
    assert error_info.value.__context__ is None or error_info.value.__suppress_context__


def test_development_accepts_a_demo_secret() -> None:
    """The demo runs with one."""
    assert (
        load_rejecting_unknown({"PAYREADY_WEBHOOK_SECRETS": "demo-1", "PAYREADY_QUILTT_API_KEY": "demo-2"}).env
        == "development"
    )


def test_repr_of_settings_has_no_secret() -> None:
    """Secrets are API keys, webhook secrets, and passwords in URLs."""
    secret = "hunter2"
    settings = load_rejecting_unknown(
        {
            "PAYREADY_QUILTT_API_KEY": secret,
            "PAYREADY_WEBHOOK_SECRETS": f"{secret},{secret}3",
            "PAYREADY_REDIS_URL": f"redis://:{secret}@r/1",
            "PAYREADY_BROKER_URL": f"amqp://u:{secret}@b",
            "PAYREADY_RESULT_BACKEND_URL": f"redis://:{secret}@q",
            "PAYREADY_DATABASE_URL": f"postgresql://u:{secret}@d/e",
            "PAYREADY_QUILTT_PROXY_URL": f"http://u:{secret}@proxy:3128",
        }
    )
    assert secret not in repr(settings)
    assert secret not in str(settings)


@pytest.mark.parametrize(
    "environ",
    [
        {"PAYREADY_WEBHOOK_PORT": "hunter2"},
        {"PAYREADY_ENV": "hunter2"},
        {**PRODUCTION, "PAYREADY_QUILTT_API_KEY": "demo-hunter2"},
    ],
)
def test_error_never_shows_a_value(environ: dict[str, str]) -> None:
    """A secret may be in the wrong variable."""
    with pytest.raises(ConfigurationError) as error_info:
        load_rejecting_unknown(environ)
    assert "hunter2" not in str(error_info.value)


ROLES = {name: command for name, command in procfile().items() if name != "flower"}


@pytest.mark.parametrize("role", ROLES)
def test_role_exits_with_one_sentence_for_an_invalid_environment(role: str, tmp_path: Path) -> None:
    """The exit status is not 0, and there is no traceback."""
    process = subprocess.run(
        ["/bin/sh", "-c", f"exec {ROLES[role]}"],
        cwd=ROOT,
        env={
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PAYREADY_DATABASE_URL": f"sqlite:///{tmp_path}/x.db",
            "PAYREADY_WEBHOOK_SECRET": "hunter2",
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert process.returncode not in (0, None)
    assert process.stderr.strip() == (
        "payready cannot start: PAYREADY_WEBHOOK_SECRET is not a setting of payready; "
        "docs/reference/configuration.md lists the settings"
    )
    assert not (tmp_path / "x.db").exists()


UNKNOWN_RESULT_BACKEND = "names no result backend of Celery"
RESULT_BACKEND_WITHOUT_PACKAGE = "names a result backend whose Python package is not installed, or has another form"


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("nonsense://hunter2", UNKNOWN_RESULT_BACKEND),
        ("amqp://u:hunter2@h", UNKNOWN_RESULT_BACKEND),
        ("mysql://u:hunter2@h/x", UNKNOWN_RESULT_BACKEND),
        ("db+nonsense://u:hunter2@h", RESULT_BACKEND_WITHOUT_PACKAGE),
        ("db+mysql://u:hunter2@h/x", RESULT_BACKEND_WITHOUT_PACKAGE),
        ("db+://hunter2", RESULT_BACKEND_WITHOUT_PACKAGE),
        ("mongodb://u:hunter2@h", RESULT_BACKEND_WITHOUT_PACKAGE),
    ],
)
def test_worker_with_an_unusable_result_backend_exits_with_one_sentence(url: str, problem: str, tmp_path: Path) -> None:
    """Not with a traceback of an import."""
    process = subprocess.run(
        ["/bin/sh", "-c", f"exec {ROLES['worker']}"],
        cwd=ROOT,
        env={
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PAYREADY_DATABASE_URL": f"sqlite:///{tmp_path}/x.db",
            "PAYREADY_RESULT_BACKEND_URL": url,
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert process.returncode not in (0, None)
    assert process.stderr.strip() == (
        f"payready cannot start: PAYREADY_RESULT_BACKEND_URL {problem}; "
        "write redis://user:password@host:6379/0, or leave it unset for PAYREADY_REDIS_URL"
    )


def test_instance_must_not_share_the_reply_exchange_of_a_deployment_without_one() -> None:
    """With `reply` the exchange of remote control is `reply.celery.pidbox`, to which kombu sends replies."""
    with pytest.raises(ConfigurationError, match=r"^PAYREADY_INSTANCE: must be another name than reply, such as live"):
        load_rejecting_unknown({"PAYREADY_INSTANCE": "reply"})


def test_callback_queue_must_not_be_a_queue_of_payready() -> None:
    """Payready's own workers would discard the callbacks, whose tasks they do not know."""
    with pytest.raises(ConfigurationError, match="PAYREADY_CALLBACK_QUEUE must be a queue of the payments service"):
        load_rejecting_unknown({"PAYREADY_CALLBACK_QUEUE": "payments"})
    with pytest.raises(ConfigurationError, match=r"payready's own workers consume live\.payments"):
        load_rejecting_unknown({"PAYREADY_CALLBACK_QUEUE": "live.payments", "PAYREADY_INSTANCE": "live"})
    assert load_rejecting_unknown({"PAYREADY_CALLBACK_QUEUE": "payments", "PAYREADY_INSTANCE": "live"}).callback_queue


SECRETS_AND_ADDRESSES = {
    "PAYREADY_QUILTT_API_KEY": "qk_hunter2",
    "PAYREADY_WEBHOOK_SECRETS": "whsec_hunter2",
    "PAYREADY_QUILTT_API_URL": "https://hunter2",
    "PAYREADY_QUILTT_AUTH_URL": "https://hunter2",
    "PAYREADY_QUILTT_PROXY_URL": "http://hunter2",
    "PAYREADY_WEBHOOK_URL": "https://hunter2/webhooks/quiltt",
    "PAYREADY_WEBHOOK_HOST": "hunter2",
    "PAYREADY_METRICS_HOST": "hunter2",
    "PAYREADY_REDIS_URL": "redis://:hunter2@r",
    "PAYREADY_BROKER_URL": "amqp://u:hunter2@r",
    "PAYREADY_RESULT_BACKEND_URL": "redis://:hunter2@r",
}
NO_CONTROL_CHARACTER = "have no line break or other control character"


@pytest.mark.parametrize("name", [*SECRETS_AND_ADDRESSES, "PAYREADY_DATABASE_URL", "PAYREADY_PRICE_LIST_FILE"])
@pytest.mark.parametrize("space", ["\n", "\r\n", " ", "\t", "\u00a0"])
def test_space_around_a_value_is_ignored(name: str, space: str) -> None:
    """A file with a secret usually ends with a newline."""
    value = SECRETS_AND_ADDRESSES.get(name, "sqlite:///hunter2")
    assert load_rejecting_unknown({name: f"{space}{value}{space}"}) == load_rejecting_unknown({name: value})


@pytest.mark.parametrize("name", SECRETS_AND_ADDRESSES)
@pytest.mark.parametrize("character", ["\n", "\r", "\x00", "\x1b", "\x7f", " ", "\u00e9", "\u2028", "\udcff"])
def test_secret_or_address_with_a_space_or_unusual_character_is_refused(name: str, character: str) -> None:
    """Such an API key would fail each call with an error of the HTTP client, or forge a header."""
    value = SECRETS_AND_ADDRESSES[name].replace("hunter2", f"hunter2{character}x")
    with pytest.raises(ConfigurationError) as error_info:
        load_rejecting_unknown({name: value})
    rule = "have only visible ASCII characters, without spaces" if character.isprintable() else NO_CONTROL_CHARACTER
    assert str(error_info.value) == f"{name}: must {rule}"


@pytest.mark.parametrize("name", ["PAYREADY_DATABASE_URL", "PAYREADY_PRICE_LIST_FILE", "PAYREADY_ENV"])
def test_control_character_is_refused_in_every_setting(name: str) -> None:
    """The name of a file may have other characters than ASCII, and spaces."""
    with pytest.raises(ConfigurationError) as error_info:
        load_rejecting_unknown({name: "sqlite:///hunter2\nx"})
    assert str(error_info.value) == f"{name}: must {NO_CONTROL_CHARACTER}"
    url = "sqlite:////é t/x.db"
    assert load_rejecting_unknown({"PAYREADY_DATABASE_URL": url}).database_url == url


@pytest.mark.parametrize(
    "options", ["ssl_ca_certs=/hunter2", "ssl_ca_certs={file}", "ssl_certfile={file}&ssl_keyfile={file}"]
)
@pytest.mark.parametrize("name", ["REDIS_URL", "BROKER_URL", "RESULT_BACKEND_URL"])
def test_unreadable_file_for_tls_stops_the_start(name: str, options: str) -> None:
    """A missing file, or one of another format. Otherwise the roles would start, and never connect."""
    with pytest.raises(ConfigurationError) as error_info:
        load_rejecting_unknown({f"PAYREADY_{name}": f"rediss://h?{options.format(file=__file__)}"})
    assert str(error_info.value).startswith(f"PAYREADY_{name} must name readable files in PEM format")
    assert "hunter2" not in str(error_info.value)


@pytest.mark.parametrize("address", ["redis://r", "rediss://r"])
def test_settings_do_not_read_certificates_of_the_host(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check is of the files in the address. A command would need a tenth of its time to read those of the host."""
    monkeypatch.delattr(ssl.SSLContext, "load_default_certs")
    assert load_rejecting_unknown({"PAYREADY_REDIS_URL": address}).redis_url == address
