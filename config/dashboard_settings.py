"""Settings of the role `dashboard`. `config.settings.Settings` inherits them."""

import ipaddress
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, SecretStr

from config.setting_types import Address, HttpUrl, split_at_commas

IpNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network


def _require_networks(values: object) -> object:
    if not isinstance(values, Sequence) or isinstance(values, str):
        return values
    try:
        networks = tuple(ipaddress.ip_network(value) for value in values)
    except ValueError:
        raise ValueError("must be addresses or networks separated by commas, such as 10.0.0.0/8,::1") from None
    if any(network.prefixlen == 0 for network in networks):
        raise ValueError("must not have all addresses: any client could name itself as any user")
    return networks


def _require_header_name(value: str) -> str:
    if not re.fullmatch("[A-Za-z0-9-]{1,64}", value):
        raise ValueError("must be the name of a header, such as X-Forwarded-User")
    return value.lower()


IpNetworks = Annotated[tuple[IpNetwork, ...], BeforeValidator(_require_networks), BeforeValidator(split_at_commas)]
HeaderName = Annotated[str, AfterValidator(_require_header_name)]


class DashboardSettings(BaseModel):
    """What the dashboard of a deployment may choose."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    dashboard_host: Address = "127.0.0.1"
    """Address that the dashboard listens on."""
    dashboard_port: int = Field(8080, ge=0, le=65535)
    """Port that the dashboard listens on."""
    dashboard_users: SecretStr = SecretStr("")
    """Users, separated by spaces: `name:role:hash`. The role is `viewer` or `operator`. `payready dashboard-user` makes
    a user. With `-` as hash, only the proxy can name the user. `*:viewer:-` is every user that the proxy names."""
    dashboard_users_file: Path | None = None
    """File with more users, one a line. Lines that begin with `#` are comments. Changes have effect at once."""
    dashboard_proxy_user_header: HeaderName | None = None
    """Header in which a proxy names the user that it has authenticated, such as `X-Forwarded-User`. The proxy must
    remove this header from requests of clients. Unset: every user logs in with a password."""
    dashboard_proxy_addresses: IpNetworks = (ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network("::1/128"))
    """Addresses or networks of the proxies, separated by commas. Only their headers name users and client addresses."""
    dashboard_flower_url: HttpUrl | None = None
    """URL of Flower for links to tasks, as a browser reaches it. Unset: no links."""
