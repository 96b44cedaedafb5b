"""The client of Quiltt: the refresh call, the balance poll, and the introspection of the API key."""

import json
import threading
import time
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

import httpx
from pydantic import BaseModel, SecretStr, ValidationError

from worker import metrics
from worker.errors import CallNotSent, CallResultUnknown, ConnectionPoolExhausted
from worker.quiltt import bounded_responses
from worker.quiltt.connecting import TunnelObserver, proxy_or_none, trusted_certificates
from worker.quiltt.messages import PolledAccount
from worker.quiltt.responses import error_class_as_words, raise_if_key_rejected, refresh_error
from worker.rules.pricing import ACCEPTED_STATUS

ACCOUNT_BALANCE_QUERY = """query LatestBalance($id: ID!) {
  account(id: $id) { currencyCode kind balance { id at source available current limit } }
}"""

ApiKeyMode = Literal["TEST", "SANDBOX", "PRODUCTION"]


class _Environment(BaseModel):
    mode: ApiKeyMode


class _Introspection(BaseModel):
    environment: _Environment


class QuilttClient:
    """The client of one process. Thread-safe.

    At most `max_connections` refresh calls are in flight. Each has its own transport with one connection, because the
    cost of an httpx pool is quadratic in the number of its connections (encode/httpcore #1035).
    """

    def __init__(
        self,
        api_url: str,
        auth_url: str,
        api_key: SecretStr,
        *,
        connect_timeout_s: float,
        read_timeout_s: float,
        max_connections: int,
        proxy_url: str | None = None,
        ca_file: Path | None = None,
    ) -> None:
        self._api_base = httpx.URL(api_url)
        self._graphql_url = api_url.rstrip("/") + "/v1/graphql"
        self._introspect_url = auth_url.rstrip("/") + "/v1/introspect/api_key"
        self._api_key = api_key
        self._headers = httpx.Headers({"Authorization": f"Bearer {api_key.get_secret_value()}"})  # hidden in its repr
        self._read_timeout_s = read_timeout_s
        self._timeout = httpx.Timeout(connect_timeout_s, read=read_timeout_s)
        self._ssl_context = trusted_certificates(ca_file)
        self._proxy = proxy_or_none(proxy_url, self._ssl_context)
        self._http_client = httpx.Client(
            headers=self._headers,
            timeout=self._timeout,
            follow_redirects=False,
            verify=self._ssl_context,
            proxy=self._proxy,
            trust_env=False,  # use no proxy from the environment for calls that cost a fee
        )
        self._idle_transports: list[httpx.HTTPTransport] = []
        self._free_connections = threading.BoundedSemaphore(max_connections)

    def request_balance_refresh(self, account_id: str) -> None:
        """Make a refresh call for the account, and observe its duration. On return the provider has accepted it (202).

        Raises:
            CallNotSent, RateLimited, CallRejected, CallResultUnknown: see `worker.errors`.
        """
        status, start = "none", time.monotonic()
        try:
            response = self._post_when_connection_free(f"/v1/accounts/{account_id}/balances/refresh")
            status = str(response.status_code)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise CallNotSent(f"no connection to Quiltt: {error_class_as_words(error)}") from error
        except httpx.RequestError as error:
            raise CallResultUnknown(f"no response from Quiltt: {error_class_as_words(error)}") from error
        finally:
            metrics.RESPONSE_SECONDS.labels(status).observe(time.monotonic() - start)
        if response.status_code != ACCEPTED_STATUS:
            raise refresh_error(response)

    def _post_when_connection_free(self, path: str) -> httpx.Response:
        if not self._free_connections.acquire(timeout=self._timeout.connect):
            raise ConnectionPoolExhausted("no connection of our own pool was free")
        try:
            transport = self._pop_idle_or_new_transport()
            timeouts = self._timeout.as_dict()
            try:
                response = self._send(transport, path, timeouts)
                # The status is the result. Whatever its body is, a call with 202 was accepted and billed.
                is_reusable = bounded_responses.try_discard_body(response, timeouts)
            except BaseException:
                transport.close()
                raise
            if is_reusable:
                self._idle_transports.append(transport)  # last in, first out: few connections stay in use
            else:
                transport.close()
        finally:
            self._free_connections.release()
        return response

    def _send(self, transport: httpx.HTTPTransport, path: str, timeouts: dict[str, float | None]) -> httpx.Response:
        target = self._api_base.raw_path.rstrip(b"/") + path.encode()
        if self._proxy is None:
            # With the extension `target` httpx parses no URL per account.
            extensions = {"timeout": timeouts, "target": target}
            return transport.handle_request(
                httpx.Request("POST", self._api_base, headers=self._headers, extensions=extensions)
            )
        # Not here: `target` would also replace the provider's host in the request for a tunnel.
        url, tunnel = self._api_base.copy_with(raw_path=target), TunnelObserver(timeouts)
        request = httpx.Request("POST", url, headers=self._headers, extensions={"timeout": timeouts, "trace": tunnel})
        try:
            return transport.handle_request(request)
        except httpx.RequestError as error:
            if tunnel.is_open:
                raise
            raise CallNotSent(f"no tunnel through the proxy: {error_class_as_words(error)}") from error

    def _pop_idle_or_new_transport(self) -> httpx.HTTPTransport:
        try:
            return self._idle_transports.pop()
        except IndexError:
            return httpx.HTTPTransport(verify=self._ssl_context, limits=_SINGLE_CONNECTION, proxy=self._proxy)

    def poll_account(self, account_id: str, profile_id: str) -> PolledAccount | None:
        """Read an account and its newest balance by GraphQL, free of charge.

        Return None if the provider has no such account.

        Raises:
            CallNotSent: the poll failed.
        """
        request = {"query": ACCOUNT_BALANCE_QUERY, "variables": {"id": account_id}}
        login = httpx.BasicAuth(profile_id, self._api_key.get_secret_value())
        try:
            response = self._post(self._graphql_url, json=request, auth=login)
        except httpx.RequestError as error:
            raise CallNotSent(f"the balance poll failed: {error_class_as_words(error)}") from error
        try:
            # GraphQL reports errors in the body of a 200. Amounts are never parsed as floats.
            body = json.loads(response.content, parse_float=Decimal, parse_int=Decimal)
            account = body["data"]["account"]
            return PolledAccount.model_validate(account) if account is not None else None
        except (ValueError, ArithmeticError, RecursionError, TypeError, KeyError):
            raise CallNotSent(f"the balance poll failed: HTTP {response.status_code} without a valid body") from None

    def introspect_api_key(self) -> ApiKeyMode:
        """Request the mode of the API key's environment, which determines the price of a call. Free of charge.

        Raises:
            CallNotSent: no response, or not a valid one.
            CallRejected: the provider does not accept the key.
        """
        try:
            response = self._post(self._introspect_url)
        except httpx.RequestError as error:
            raise CallNotSent(f"the API key could not be checked: {error_class_as_words(error)}") from error
        raise_if_key_rejected(response)
        try:
            return _Introspection.model_validate_json(response.content).environment.mode
        except ValidationError:
            raise CallNotSent(
                f"the API key could not be checked: HTTP {response.status_code} without a valid body"
            ) from None

    def _post(self, url: str, **options: Any) -> httpx.Response:
        return bounded_responses.request(self._http_client, "POST", url, body_timeout_s=self._read_timeout_s, **options)

    def close(self) -> None:
        """Close all connections."""
        self._http_client.close()
        for transport in self._idle_transports:
            transport.close()


_SINGLE_CONNECTION = httpx.Limits(max_connections=1, max_keepalive_connections=1)
