"""Quiltt over HTTP: the paid call, the free read, and the question whose key ours is. The only home of httpx.

What an answer means follows Quiltt's API description: there is no machine-readable error code, so the status is
all there is to go by, and no request id, so an answer that is lost leaves it open whether the call was accepted.
"""

import json
import re
import threading
import time
from datetime import UTC, datetime
from decimal import Decimal
from typing import Literal

import httpx
from pydantic import BaseModel, SecretStr, ValidationError

from worker import metrics
from worker.errors import (
    CallFailed,
    CallNotSent,
    CallRejected,
    CallResultUnknown,
    ConnectionPoolExhausted,
    RateLimited,
    Reason,
)
from worker.quiltt.messages import PolledAccount

_REJECTIONS = {
    400: (Reason.ACCOUNT_UNSUPPORTED, "the provider does not refresh accounts of this kind"),
    401: (Reason.NOT_AUTHORIZED, "the provider does not accept our API key (PAYREADY_QUILTT_API_KEY)"),
    403: (Reason.CONNECTION_INACTIVE, "the account's connection is disconnected or in an error state"),
    404: (Reason.ACCOUNT_NOT_FOUND, "the provider does not know the account"),
}

ACCOUNT_BALANCE_QUERY = """query LatestBalance($id: ID!) {
  account(id: $id) { currencyCode kind balance { id at source available current limit } }
}"""

ApiKeyMode = Literal["TEST", "SANDBOX", "PRODUCTION"]


class _Environment(BaseModel):
    mode: ApiKeyMode


class _Introspection(BaseModel):
    environment: _Environment


class QuilttClient:
    """A client for one process.

    It keeps at most `connections` calls in flight. Each has a transport of its own, with one connection: a pool of
    httpx works in the square of what is in it (encode/httpcore #1035).
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
    ) -> None:
        self._api_base = httpx.URL(api_url)
        self._graphql_url = api_url.rstrip("/") + "/v1/graphql"
        self._introspect_url = auth_url.rstrip("/") + "/v1/introspect/api_key"
        self._api_key = api_key
        self._headers = httpx.Headers({"Authorization": f"Bearer {api_key.get_secret_value()}"})  # its repr hides it
        self._timeout = httpx.Timeout(connect_timeout_s, read=read_timeout_s)
        self._ssl_context = httpx.create_ssl_context(trust_env=False)
        self._http_client = httpx.Client(
            headers=self._headers,
            timeout=self._timeout,
            follow_redirects=False,
            verify=self._ssl_context,
            trust_env=False,  # no proxy gets between us and a bill without being configured
        )
        self._idle_transports: list[httpx.HTTPTransport] = []
        self._free_connections = threading.BoundedSemaphore(max_connections)

    def refresh_balance(self, account_id: str) -> int:
        """Ask for a fresh balance of the account; returns the status, 202.

        Raises:
            CallNotSent, RateLimited, CallRejected, CallResultUnknown: see `worker.errors`.
        """
        status, start = "none", time.monotonic()
        try:
            response = self._post(f"/v1/accounts/{account_id}/balances/refresh")
            status = str(response.status_code)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise CallNotSent(f"no connection to the provider: {_error_words(error)}") from error
        except httpx.RequestError as error:
            raise CallResultUnknown(f"the provider's answer was lost: {_error_words(error)}") from error
        finally:
            metrics.RESPONSE_SECONDS.labels(status).observe(time.monotonic() - start)
        if response.status_code != httpx.codes.ACCEPTED:
            raise _error_from_response(response)
        return response.status_code

    def _post(self, path: str) -> httpx.Response:
        if not self._free_connections.acquire(timeout=self._timeout.connect):
            raise ConnectionPoolExhausted("no connection to the provider was free")
        try:
            transport = self._take_transport()
            # With a target of its own, a request needs no URL that is read anew for each account.
            target = self._api_base.raw_path.rstrip(b"/") + path.encode()
            extensions = {"timeout": self._timeout.as_dict(), "target": target}
            request = httpx.Request("POST", self._api_base, headers=self._headers, extensions=extensions)
            response = transport.handle_request(request)
            response.read()
            self._idle_transports.append(
                transport
            )  # the one that was used last is used next; one that failed is not used again
        finally:
            self._free_connections.release()
        return response

    def _take_transport(self) -> httpx.HTTPTransport:
        try:
            return self._idle_transports.pop()
        except IndexError:
            return httpx.HTTPTransport(verify=self._ssl_context, limits=_SINGLE_CONNECTION)

    def poll_account(self, account_id: str, profile_id: str) -> PolledAccount | None:
        """Read an account and its newest balance by GraphQL: free of charge, and whatever became of its webhook.

        None if the provider shows none: it reports errors in the body of a 200.

        Raises:
            CallNotSent: it could not be read. Nothing is charged for asking.
        """
        question = {"query": ACCOUNT_BALANCE_QUERY, "variables": {"id": account_id}}
        login = httpx.BasicAuth(profile_id, self._api_key.get_secret_value())
        try:
            response = self._http_client.post(self._graphql_url, json=question, auth=login)
        except httpx.RequestError as error:
            raise CallNotSent(f"the balance could not be read: {_error_words(error)}") from error
        try:
            told = json.loads(response.content, parse_float=Decimal, parse_int=Decimal)  # never through a float
            account = told["data"]["account"]
            return PolledAccount.model_validate(account) if account is not None else None
        except (ValueError, ArithmeticError, RecursionError, TypeError, KeyError):
            raise CallNotSent(f"the provider answered {response.status_code} when a balance was read") from None

    def api_key_mode(self) -> ApiKeyMode:
        """The mode of the environment that our key belongs to; it decides the price of a call.

        Raises:
            CallNotSent: the provider could not be asked, or gave no sensible answer. Nothing is charged for asking.
            CallRejected: our key is wrong.
        """
        try:
            response = self._http_client.post(self._introspect_url)
        except httpx.RequestError as error:
            raise CallNotSent(f"the provider could not be asked about our key: {_error_words(error)}") from error
        if response.status_code in (401, 403):
            reason, detail = _REJECTIONS[401]
            raise CallRejected(response.status_code, reason, detail)
        try:
            return _Introspection.model_validate_json(response.content).environment.mode
        except ValidationError:
            raise CallNotSent(f"the provider answered {response.status_code} when asked about our key") from None

    def close(self) -> None:
        """Close the connections."""
        self._http_client.close()
        for transport in self._idle_transports:
            transport.close()


_SINGLE_CONNECTION = httpx.Limits(max_connections=1, max_keepalive_connections=1)


def _error_words(error: Exception) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(error).__name__).lower()


def _error_from_response(response: httpx.Response) -> CallFailed:
    status = response.status_code
    if status == httpx.codes.TOO_MANY_REQUESTS:
        return RateLimited("the provider's rate limit is reached", _rate_limit_reset(response))
    if status in _REJECTIONS:
        return CallRejected(status, *_REJECTIONS[status])
    if response.is_client_error and status != httpx.codes.REQUEST_TIMEOUT:
        return CallRejected(
            status, Reason.PROVIDER_UNAVAILABLE, f"the provider answered {status}, which is not documented"
        )
    return CallResultUnknown(f"the provider answered {status}", status)


def _rate_limit_reset(response: httpx.Response) -> datetime | None:
    """When the rate limit allows more: `Ratelimit-Reset`, in Unix seconds."""
    seconds = response.headers.get("Ratelimit-Reset", "")
    return datetime.fromtimestamp(int(seconds), UTC) if re.fullmatch(r"[0-9]{1,11}", seconds) else None
