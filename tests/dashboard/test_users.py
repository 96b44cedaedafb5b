"""The users of the settings: what is accepted, and that no error repeats a hash."""

from pathlib import Path
from typing import Any

import pytest
from argon2 import PasswordHasher
from argon2.low_level import Type

from config.production_rules import DEMO_PASSWORD_HASH
from config.settings import ConfigurationError, Settings, load_rejecting_unknown
from dashboard.access.password_hashes import hash_password, is_acceptable_hash, verify_password
from dashboard.access.users import Role, UserDirectory
from demo.dev_stack import DASHBOARD_USERS
from tests.dashboard.conftest import PASSWORD_HASH


def directory(users: str = "", **environ: str) -> UserDirectory:
    return UserDirectory(load_rejecting_unknown({"PAYREADY_DASHBOARD_USERS": users, **environ}))


PROXY = {"PAYREADY_DASHBOARD_PROXY_USER_HEADER": "X-Forwarded-User"}


def test_users_have_roles_and_passwords() -> None:
    found = directory(f"  o:operator:{PASSWORD_HASH}   v@example.com:viewer:- ").accounts()
    assert {name: (account.role, account.password_hash) for name, account in found.items()} == {
        "o": (Role.OPERATOR, PASSWORD_HASH),
        "v@example.com": (Role.VIEWER, None),
    }


@pytest.mark.parametrize(
    ("users", "problem"),
    [
        ("olivia", "user 1 must be name:role:hash"),
        (f"olivia:admin:{PASSWORD_HASH}", "user 1 must be name:role:hash"),
        (f"o:operator:{PASSWORD_HASH} :viewer:{PASSWORD_HASH}", "user 2 must be name:role:hash"),
        (f"o:operator:{PASSWORD_HASH} o:viewer:-", "user 2 has the name of an earlier user"),
        (f"*:viewer:{PASSWORD_HASH}", r"user 1 must be \*:viewer:-"),
        ("olivia:operator:secret", "user 1 has no usable hash"),
        ("olivia:operator:", "user 1 has no usable hash"),
        (f"olivia:operator:{PASSWORD_HASH}x:y", "user 1 has no usable hash"),
        ("olivia:operator:$2b$12$abcdefghijklmnopqrstuuuuuuuuuuuuuuuuuuuuuuuuuuuuuuuuu", "user 1 has no usable hash"),
        ("", "must have a user with a password"),
        ("olivia:operator:- *:viewer:-", "must have a user with a password"),
    ],
)
def test_error_says_what_to_write_and_repeats_no_hash(users: str, problem: str) -> None:
    with pytest.raises(ConfigurationError, match=problem) as error_info:
        directory(users)
    text = str(error_info.value)
    assert text.startswith("PAYREADY_DASHBOARD_USERS")
    assert "secret" not in text
    assert "$" not in text


def test_error_of_the_file_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "users"
    for content in (None, "olivia:operator:secret", b"\xff\xfe"):
        if content is not None:
            file.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(ConfigurationError, match=r"^PAYREADY_DASHBOARD_USERS_FILE") as error_info:
            directory(PAYREADY_DASHBOARD_USERS_FILE=str(file))
        assert "secret" not in str(error_info.value)


def test_name_in_settings_and_file_is_refused(tmp_path: Path) -> None:
    """Otherwise it would not be clear which role counts."""
    (tmp_path / "users").write_text(f"olivia:operator:{PASSWORD_HASH}")
    with pytest.raises(ConfigurationError, match="_FILE: user 1 has the name of an earlier user"):
        directory(f"olivia:viewer:{PASSWORD_HASH}", PAYREADY_DASHBOARD_USERS_FILE=str(tmp_path / "users"))


def test_users_of_a_proxy_must_be_named() -> None:
    with pytest.raises(ConfigurationError, match=r"write \*:viewer:- for every user"):
        directory(**PROXY)
    user = directory("*:viewer:-", **PROXY).user_of_proxy("new")
    assert user is not None
    assert not user.is_operator


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PROXY_USER_HEADER", "X-Forwarded-User: a"),
        ("PROXY_USER_HEADER", "X_User"),
        ("PROXY_ADDRESSES", "everywhere"),
        ("PROXY_ADDRESSES", "0.0.0.0/0"),
        ("PROXY_ADDRESSES", "10.0.0.1,::/0"),
        ("PROXY_ADDRESSES", "10.0.0.1/8"),
        ("FLOWER_URL", "javascript:alert(1)"),
        ("PORT", "70000"),
    ],
)
def test_bad_setting_is_refused_by_its_name(name: str, value: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^PAYREADY_DASHBOARD_{name}: ") as error_info:
        load_rejecting_unknown({f"PAYREADY_DASHBOARD_{name}": value})
    assert value not in str(error_info.value)


def test_settings_show_no_hash() -> None:
    settings = load_rejecting_unknown({"PAYREADY_DASHBOARD_USERS": f"o:operator:{PASSWORD_HASH}"})
    assert PASSWORD_HASH not in repr(settings)
    assert PASSWORD_HASH not in settings.model_dump_json()


def test_proxies_are_networks() -> None:
    settings = load_rejecting_unknown({"PAYREADY_DASHBOARD_PROXY_ADDRESSES": "10.0.0.0/8, ::1"})
    assert [str(network) for network in settings.dashboard_proxy_addresses] == ["10.0.0.0/8", "::1/128"]
    default = Settings().dashboard_proxy_addresses
    assert [str(network) for network in default] == ["127.0.0.0/8", "::1/128"]


@pytest.mark.parametrize("is_in_file", [True, False])
def test_production_refuses_the_user_of_the_demo(tmp_path: Path, *, is_in_file: bool) -> None:
    """Its password is public. The name does not matter."""
    (tmp_path / "users").write_text(f"olivia:operator:{DEMO_PASSWORD_HASH}\n")
    setting = "PAYREADY_DASHBOARD_USERS_FILE" if is_in_file else "PAYREADY_DASHBOARD_USERS"
    value = str(tmp_path / "users") if is_in_file else f"olivia:operator:{DEMO_PASSWORD_HASH}"
    found = UserDirectory(load_rejecting_unknown({setting: value}))
    assert verify_password(found.accounts()["olivia"].password_hash or "", "demo")
    production = {"PAYREADY_ENV": "production", "PAYREADY_PRICE_LIST_FILE": "prices.toml"}
    with pytest.raises(ConfigurationError) as error_info:
        UserDirectory(load_rejecting_unknown({setting: value, **production}))
    assert str(error_info.value) == (
        f"{setting}: user olivia must not have the demo's password in production; "
        "`payready dashboard-user olivia --role operator` makes a user with another one"
    )


def test_users_of_the_demo_are_those_that_production_refuses() -> None:
    assert directory(DASHBOARD_USERS).accounts()["demo"].password_hash == DEMO_PASSWORD_HASH


def test_name_without_a_password_is_verified_as_some_user_is() -> None:
    """Users of different costs are chosen by the name, always alike: no name shows by its time that it is unknown."""
    hashes = {PASSWORD_HASH, hash_password("another password")}
    first, second = sorted(hashes)
    users = directory(f"a:viewer:{first} b:viewer:{second} p:viewer:-", **PROXY)
    unknown = {name: users.hash_to_verify(name) for name in ("p", *map(str, range(50)))}
    assert (users.hash_to_verify("a"), users.hash_to_verify("b")) == (first, second)
    assert set(unknown.values()) == hashes
    again = directory(f"b:viewer:{second} a:viewer:{first} p:viewer:-", **PROXY)
    assert {name: again.hash_to_verify(name) for name in unknown} == unknown


# --- hashes -----------------------------------------------------------------------------------------------------------


def test_hash_is_verified_and_salted() -> None:
    password_hash = hash_password("pässword with 漢字")
    assert is_acceptable_hash(password_hash)
    assert verify_password(password_hash, "pässword with 漢字")
    assert not verify_password(password_hash, "password with 漢字")
    assert hash_password("a") != hash_password("a")


@pytest.mark.parametrize(
    "options",
    [
        {"memory_cost": 8192},
        {"memory_cost": 300_000, "time_cost": 1},
        {"time_cost": 11, "memory_cost": 19_456},
        {"parallelism": 9, "memory_cost": 19_456},
        {"type": Type.I, "memory_cost": 19_456},
        {"hash_len": 8, "memory_cost": 19_456},
    ],
)
def test_weak_or_costly_hash_is_refused(options: dict[str, Any]) -> None:
    """A weak one is guessed fast after a leak. A costly one lets each login occupy the process."""
    assert not is_acceptable_hash(PasswordHasher(**{"time_cost": 1, "parallelism": 1, **options}).hash("a"))


@pytest.mark.parametrize("text", ["", "x", PASSWORD_HASH + "\n", PASSWORD_HASH[:-30], PASSWORD_HASH.replace("$", "")])
def test_broken_hash_is_refused_and_verifies_nothing(text: str) -> None:
    assert not is_acceptable_hash(text)
    assert not verify_password(text, "a password of the tests")
