"""What a proxy in front says about a request: the user that it has authenticated, and the address of the client.

Any client can send these headers, so they count only on a connection from an address of the settings. The name must be
in exactly one header: with a second one, the client's own header has passed the proxy.
"""

from collections.abc import Iterator, Sequence
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address

from starlette.requests import HTTPConnection

from config.dashboard_settings import DashboardSettings

IpAddress = IPv4Address | IPv6Address
IPV6_PREFIX_BITS = 64
"""An IPv6 client usually has all addresses of a network of this size."""
MAX_FORWARDED_ADDRESSES = 20


class AmbiguousUser(Exception):
    """A request from a proxy has several headers that name its user."""


class TrustedProxies:
    """The proxies of the settings."""

    def __init__(self, settings: DashboardSettings) -> None:
        self._networks = settings.dashboard_proxy_addresses
        self._user_header = settings.dashboard_proxy_user_header

    def user_name(self, connection: HTTPConnection) -> str | None:
        """Return the name of the user that a proxy has authenticated. None if no proxy names one.

        Raises:
            AmbiguousUser: the request has several names.
        """
        if self._user_header is None or not self._is_trusted(_peer(connection)):
            return None
        names = connection.headers.getlist(self._user_header)
        if len(names) > 1:
            raise AmbiguousUser
        return names[0] if names and names[0] else None

    def client_network(self, connection: HTTPConnection) -> str:
        """Return the client's address, or its network if it is an IPv6 address: failed logins are counted for it."""
        address = _peer(connection)
        forwarded = _forwarded_addresses(connection.headers.getlist("x-forwarded-for"))
        while self._is_trusted(address) and (earlier := next(forwarded, None)) is not None:
            address = earlier
        if isinstance(address, IPv6Address):
            return str(IPv6Network((address, IPV6_PREFIX_BITS), strict=False))
        return str(address)

    def _is_trusted(self, address: IpAddress | None) -> bool:
        return address is not None and any(address in network for network in self._networks)


def _peer(connection: HTTPConnection) -> IpAddress | None:
    return _parse(connection.client.host) if connection.client else None


def _forwarded_addresses(headers: Sequence[str]) -> Iterator[IpAddress]:
    """Yield the addresses, the last one first, up to the first that is none."""
    for text in reversed(",".join(headers).split(",")[-MAX_FORWARDED_ADDRESSES:]):
        address = _parse(text.strip())
        if address is None:
            return
        yield address


def _parse(text: str) -> IpAddress | None:
    try:
        address = ip_address(text)
    except ValueError:
        return None
    if isinstance(address, IPv6Address):
        return address.ipv4_mapped or address
    return address
