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
from worker.errors import CallFailed, Crowded, Reason, Refused, Throttled, Uncertain, Unsent
from worker.messages import AccountView

_REFUSALS = {
    400: (Reason.ACCOUNT_UNSUPPORTED, "the provider does not refresh accounts of this kind"),
    401: (Reason.NOT_AUTHORIZED, "the provider does not accept our API key (PAYREADY_QUILTT_API_KEY)"),
    403: (Reason.CONNECTION_INACTIVE, "the account's connection is disconnected or in an error state"),
    404: (Reason.ACCOUNT_NOT_FOUND, "the provider does not know the account"),
}

READ_ACCOUNT = """query LatestBalance($id: ID!) {
  account(id: $id) { currencyCode kind balance { id at source available current limit } }
}"""

Mode = Literal["TEST", "SANDBOX", "PRODUCTION"]


class _Environment(BaseModel):
    mode: Mode


class _Introspection(BaseModel):
    environment: _Environment


class Quiltt:
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
        connections: int,
    ) -> None:
        self._api = httpx.URL(api_url)
        self._graphql_url = api_url.rstrip("/") + "/v1/graphql"
        self._introspect_url = auth_url.rstrip("/") + "/v1/introspect/api_key"
        self._secret = api_key
        self._headers = httpx.Headers({"Authorization": f"Bearer {api_key.get_secret_value()}"})  # its repr hides it
        self._timeout = httpx.Timeout(connect_timeout_s, read=read_timeout_s)
        self._ssl = httpx.create_ssl_context(trust_env=False)
        self._http = httpx.Client(
            headers=self._headers,
            timeout=self._timeout,
            follow_redirects=False,
            verify=self._ssl,
            trust_env=False,  # no proxy gets between us and a bill without being configured
        )
        self._idle: list[httpx.HTTPTransport] = []
        self._free = threading.BoundedSemaphore(connections)

    def refresh_balance(self, account_id: str) -> int:
        """Ask for a fresh balance of the account; returns the status, 202.

        Raises:
            Unsent, Throttled, Refused, Uncertain: see `worker.errors`.
        """
        status, start = "none", time.monotonic()
        try:
            answer = self._post(f"/v1/accounts/{account_id}/balances/refresh")
            status = str(answer.status_code)
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise Unsent(f"no connection to the provider: {_name(error)}") from error
        except httpx.RequestError as error:
            raise Uncertain(f"the provider's answer was lost: {_name(error)}") from error
        finally:
            metrics.ANSWERS.labels(status).observe(time.monotonic() - start)
        if answer.status_code != httpx.codes.ACCEPTED:
            raise _failure(answer)
        return answer.status_code

    def _post(self, path: str) -> httpx.Response:
        if not self._free.acquire(timeout=self._timeout.connect):
            raise Crowded("no connection to the provider was free")
        try:
            transport = self._transport()
            # With a target of its own, a request needs no URL that is read anew for each account.
            target = self._api.raw_path.rstrip(b"/") + path.encode()
            extensions = {"timeout": self._timeout.as_dict(), "target": target}
            request = httpx.Request("POST", self._api, headers=self._headers, extensions=extensions)
            answer = transport.handle_request(request)
            answer.read()
            self._idle.append(transport)  # the one that was used last is used next; one that failed is not used again
        finally:
            self._free.release()
        return answer

    def _transport(self) -> httpx.HTTPTransport:
        try:
            return self._idle.pop()
        except IndexError:
            return httpx.HTTPTransport(verify=self._ssl, limits=_ONE)

    def read_account(self, account_id: str, profile_id: str) -> AccountView | None:
        """Read an account and its newest balance by GraphQL: free of charge, and whatever became of its webhook.

        None if the provider shows none: it reports errors in the body of a 200.

        Raises:
            Unsent: it could not be read. Nothing is charged for asking.
        """
        question = {"query": READ_ACCOUNT, "variables": {"id": account_id}}
        login = httpx.BasicAuth(profile_id, self._secret.get_secret_value())
        try:
            answer = self._http.post(self._graphql_url, json=question, auth=login)
        except httpx.RequestError as error:
            raise Unsent(f"the balance could not be read: {_name(error)}") from error
        try:
            told = json.loads(answer.content, parse_float=Decimal, parse_int=Decimal)  # never through a float
            account = told["data"]["account"]
            return AccountView.model_validate(account) if account is not None else None
        except (ValueError, ArithmeticError, RecursionError, TypeError, KeyError):
            raise Unsent(f"the provider answered {answer.status_code} when a balance was read") from None

    def mode(self) -> Mode:
        """The mode of the environment that our key belongs to; it decides the price of a call.

        Raises:
            Unsent: the provider could not be asked, or gave no sensible answer. Nothing is charged for asking.
            Refused: our key is wrong.
        """
        try:
            answer = self._http.post(self._introspect_url)
        except httpx.RequestError as error:
            raise Unsent(f"the provider could not be asked about our key: {_name(error)}") from error
        if answer.status_code in (401, 403):
            reason, detail = _REFUSALS[401]
            raise Refused(answer.status_code, reason, detail)
        try:
            return _Introspection.model_validate_json(answer.content).environment.mode
        except ValidationError:
            raise Unsent(f"the provider answered {answer.status_code} when asked about our key") from None

    def close(self) -> None:
        """Close the connections."""
        self._http.close()
        for transport in self._idle:
            transport.close()


_ONE = httpx.Limits(max_connections=1, max_keepalive_connections=1)


def _name(error: Exception) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(error).__name__).lower()


def _failure(answer: httpx.Response) -> CallFailed:
    status = answer.status_code
    if status == httpx.codes.TOO_MANY_REQUESTS:
        return Throttled("the provider's rate limit is reached", _reset(answer))
    if status in _REFUSALS:
        return Refused(status, *_REFUSALS[status])
    if answer.is_client_error and status != httpx.codes.REQUEST_TIMEOUT:
        return Refused(status, Reason.PROVIDER_UNAVAILABLE, f"the provider answered {status}, which is not documented")
    return Uncertain(f"the provider answered {status}", status)


def _reset(answer: httpx.Response) -> datetime | None:
    """When the rate limit allows more: `Ratelimit-Reset`, in Unix seconds."""
    seconds = answer.headers.get("Ratelimit-Reset", "")
    return datetime.fromtimestamp(int(seconds), UTC) if re.fullmatch(r"[0-9]{1,11}", seconds) else None
