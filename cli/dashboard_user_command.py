"""`payready dashboard-user`: make the line of a user for the dashboard's settings."""

import sys
from typing import Annotated

import typer

from cli import render
from cli.command_line import AsJson, fail
from dashboard.access.password_hashes import MIN_PASSWORD_CHARS, hash_password
from dashboard.access.users import Role, is_user_name


def dashboard_user(
    name: Annotated[str, typer.Argument(help="Name of the user: visible ASCII characters without a colon.")],
    role: Annotated[Role, typer.Option(help="A viewer reads; an operator also acts.")] = Role.VIEWER,
    as_json: AsJson = False,
) -> None:
    """Print a line for PAYREADY_DASHBOARD_USERS or its file: the name, the role, and a hash of the password.

    The password is asked for twice. Without a terminal it is the first line of standard input.
    """
    if not is_user_name(name):
        raise typer.BadParameter("must have visible ASCII characters without a colon", param_hint="NAME")
    password = _prompt_twice() if sys.stdin.isatty() else sys.stdin.readline().rstrip("\r\n")
    if len(password) < MIN_PASSWORD_CHARS:
        fail(f"the password must have at least {MIN_PASSWORD_CHARS} characters")
    line = f"{name}:{role}:{hash_password(password)}"
    typer.echo(render.as_json({"user": line}) if as_json else line)


def _prompt_twice() -> str:
    return str(typer.prompt("Password", hide_input=True, confirmation_prompt=True, err=True))
