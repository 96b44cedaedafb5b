"""`payready dashboard-user` prints a line that the dashboard accepts as a user."""

import json
import subprocess
import sys

import pytest
from pydantic import SecretStr

from config.settings import Settings
from dashboard.access.password_hashes import verify_password
from dashboard.access.users import Role, UserDirectory
from demo.processes import ROOT

PASSWORD = "correct horse battery"


def run(*arguments: str, password: str = PASSWORD) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cli.main", "dashboard-user", *arguments]
    return subprocess.run(
        command, cwd=ROOT, input=f"{password}\n", capture_output=True, text=True, timeout=60, check=False
    )


def test_line_is_a_user_with_the_password() -> None:
    completed = run("olivia", "--role", "operator")
    assert completed.returncode == 0, completed.stderr
    line = completed.stdout.strip()
    account = UserDirectory(Settings(dashboard_users=SecretStr(line))).account_of_password("olivia")
    assert account is not None
    assert account.role == Role.OPERATOR
    assert account.password_hash is not None
    assert verify_password(account.password_hash, PASSWORD)
    assert PASSWORD not in completed.stdout + completed.stderr
    assert json.loads(run("olivia", "--json").stdout)["user"].startswith("olivia:viewer:$argon2id$")


@pytest.mark.parametrize(
    ("arguments", "password", "problem"),
    [
        (("olivia",), "short", "at least 12 characters"),
        (("olivia:x",), PASSWORD, "without a colon"),
        (("*",), PASSWORD, "visible ASCII"),
        (("olivia", "--role", "root"), PASSWORD, "viewer"),
    ],
)
def test_unusable_user_is_refused(arguments: tuple[str, ...], password: str, problem: str) -> None:
    completed = run(*arguments, password=password)
    assert completed.returncode != 0
    assert completed.stdout == ""
    assert problem in " ".join(completed.stderr.replace("│", " ").split())
