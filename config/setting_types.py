"""Types of settings: each refuses a bad value with a sentence that says what to write, and never repeats the value."""

import re
import ssl
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr

ENV_PREFIX = "PAYREADY_"
HTTP_URL_PATTERN = r"^https?://[^\s?#]+$"
"""A base URL to which paths are appended. Without a scheme no request could be sent, and each call's result would be
unknown."""
_KOMBU_REPLIES = "reply"
"""With this instance the exchange of remote control would be `reply.celery.pidbox`. That is the exchange of the replies
in a deployment without an instance."""
MAX_PRIORITY = 9
"""Highest priority of a message on Redis."""


def variable_name(setting: str) -> str:
    """Return the environment variable of a setting."""
    return ENV_PREFIX + setting.upper()


def split_at_commas(value: object) -> object:
    """Return the parts of a text, without those that are empty. Another value stays."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _require_visible_ascii(value: str | SecretStr) -> str | SecretStr:
    # A space or a control character in an API key breaks the header of each request.
    text = value.get_secret_value() if isinstance(value, SecretStr) else value
    if not re.fullmatch("[!-~]*", text):
        raise ValueError("must have only visible ASCII characters, without spaces")
    return value


def _require_host_and_port(url: str) -> str:
    # The HTTP client would refuse the URL at the first call, not at the start.
    try:
        parts = urlsplit(url)
        is_complete = bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_complete = False
    if not is_complete:
        raise ValueError("must have a host, and a port from 1 to 65535 or none")
    return url


def _require_no_path(url: str) -> str:
    if urlsplit(url).path not in ("", "/"):
        raise ValueError("must have no path: write http://host:port, or http://user:password@host:port")
    return url


def _require_certificates(file: Path) -> Path:
    try:
        ssl.create_default_context(cafile=file)
    except OSError as error:  # `SSLError` is one
        raise ValueError("must name a readable file with certificates in PEM format") from error
    return file


def _require_steps_from_0_that_ascend(steps: tuple[int, ...]) -> tuple[int, ...]:
    if not steps or steps[0] != 0 or steps[-1] > MAX_PRIORITY or list(steps) != sorted(set(steps)):
        raise ValueError(f"must be ascending numbers from 0 to {MAX_PRIORITY} that begin with 0, such as 0,3,6,9")
    return steps


def _require_that_no_queue_name_has_it(separator: str) -> str:
    # Otherwise kombu finds another queue in the name of a list: with the separator "m", `payments` is `pay`.
    if re.search(r"[\s\\]", separator) or re.fullmatch(r"[\w.@-]*", separator):
        raise ValueError(
            "must have a character that no queue name has, such as a colon, and no space or backslash; "
            "leave it unset for kombu's default"
        )
    return separator


def _require_instance_name(value: str) -> str:
    if not re.fullmatch("[a-z0-9-]{1,32}", value):
        raise ValueError("must be 1 to 32 characters of a-z, 0-9 and -, such as live")
    if value == _KOMBU_REPLIES:
        raise ValueError(f"must be another name than {value}, such as live: names of kombu begin with it")
    return value


Address = Annotated[str, AfterValidator(_require_visible_ascii)]
"""A URL or the name of a host."""
HttpUrl = Annotated[Address, Field(pattern=HTTP_URL_PATTERN), AfterValidator(_require_host_and_port)]
ProxyUrl = Annotated[HttpUrl, AfterValidator(_require_no_path)]
CertificateFile = Annotated[Path, AfterValidator(_require_certificates)]
InstanceName = Annotated[str, AfterValidator(_require_instance_name)]
Secret = Annotated[SecretStr, AfterValidator(_require_visible_ascii)]
Secrets = Annotated[tuple[Secret, ...], BeforeValidator(split_at_commas)]
PrioritySteps = Annotated[
    tuple[int, ...], BeforeValidator(split_at_commas), AfterValidator(_require_steps_from_0_that_ascend)
]
PrioritySeparator = Annotated[str, AfterValidator(_require_that_no_queue_name_has_it)]
CallbackQueue = Annotated[str, Field(pattern=r"^[!-~]{1,200}$")]
