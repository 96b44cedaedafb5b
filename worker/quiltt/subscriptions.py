"""Our webhook subscription at the provider: what it must be, whether it is, and the calls that make it so.

None of these calls is charged. What a subscription's secret is, only the provider's dashboard tells.
"""

import logging
from collections.abc import Sequence
from typing import Annotated, Any, Self

import httpx
from pydantic import BaseModel, ConfigDict, Field, SecretStr, TypeAdapter, ValidationError

from worker import metrics
from worker.errors import CallFailed, CallNotSent, CallRejected, Reason

log = logging.getLogger(__name__)

REQUIRED_EVENT_TYPES = (
    "balance.created",
    "connection.synced.errored.repairable",
    "connection.synced.errored.institution",
    "connection.synced.errored.provider",
    "connection.synced.errored.service",
    "connection.disconnected",
    "account.reconnected",
    "profile.deleted",
)
"""What payready does something about."""


class Subscription(BaseModel):
    """A subscription as the provider tells it."""

    model_config = ConfigDict(frozen=True, extra="ignore", hide_input_in_errors=True)

    id: str
    name: str = ""
    target_url: Annotated[str, Field(alias="targetUrl")]
    event_types: Annotated[tuple[str, ...], Field(alias="eventTypes")]
    disabled: bool = False

    def problems(self) -> list[str]:
        """What keeps it from doing what it is for."""
        found = [f"{self.id} is disabled"] if self.disabled else []
        missing = [kind for kind in REQUIRED_EVENT_TYPES if kind not in self.event_types]
        return found + ([f"{self.id} leaves out {', '.join(missing)}"] if missing else [])


_SUBSCRIPTION_LIST = TypeAdapter(list[Subscription])


def for_url(subscriptions: Sequence[Subscription], url: str) -> list[Subscription]:
    """Those that deliver to `url`, the one that does it best first; while a secret is rotated there are two."""
    return sorted(
        (one for one in subscriptions if one.target_url == url), key=lambda one: (len(one.problems()), one.id)
    )


def problems(subscriptions: Sequence[Subscription], url: str) -> list[str]:
    """What is wrong with our subscription; nothing if one of those that deliver to `url` does all that is needed."""
    insecure = [] if url.startswith("https://") else [f"{url} is not https"]
    ours = for_url(subscriptions, url)
    return insecure + (ours[0].problems() if ours else [f"no subscription delivers to {url}"])


class SubscriptionsClient:
    """The provider's subscriptions, for as long as a question takes; to be closed.

    Every method raises `CallRejected` if our key is wrong, `CallNotSent` if the provider could not be asked, and `CallFailed`
    if it answered something that its documentation does not have.
    """

    def __init__(self, api_url: str, api_key: SecretStr, *, connect_timeout_s: float, read_timeout_s: float) -> None:
        self._http_client = httpx.Client(
            base_url=api_url.rstrip("/") + "/v1/webhooks",
            headers={"Authorization": f"Bearer {api_key.get_secret_value()}"},
            timeout=httpx.Timeout(connect_timeout_s, read=read_timeout_s),
            follow_redirects=False,
            trust_env=False,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http_client.close()

    def list_all(self) -> list[Subscription]:
        """Every subscription of the key's environment."""
        response = self._request("GET", "/subscriptions")
        try:
            return _SUBSCRIPTION_LIST.validate_json(response.content)
        except ValidationError:
            raise _undocumented_response(response) from None

    def create(self, url: str) -> Subscription:
        """Have our events delivered to `url`."""
        fields = {"name": "payready", "targetUrl": url, "eventTypes": list(REQUIRED_EVENT_TYPES), "disabled": False}
        return self._request_subscription("POST", "/subscriptions", fields)

    def repair(self, subscription: Subscription) -> Subscription:
        """Enable a subscription, and add what it leaves out. What it has beyond that stays."""
        return self.update(
            subscription,
            disabled=False,
            eventTypes=list(dict.fromkeys([*subscription.event_types, *REQUIRED_EVENT_TYPES])),
        )

    def update(self, subscription: Subscription, **fields: Any) -> Subscription:
        """Change some of a subscription's fields."""
        return self._request_subscription("PATCH", f"/subscriptions/{subscription.id}", fields)

    def delete(self, subscription: Subscription) -> None:
        """Have nothing more delivered by this subscription."""
        self._request("DELETE", f"/subscriptions/{subscription.id}")

    def _request_subscription(self, method: str, path: str, fields: dict[str, Any]) -> Subscription:
        response = self._request(method, path, fields)
        try:
            return Subscription.model_validate_json(response.content)
        except ValidationError:
            raise _undocumented_response(response) from None

    def _request(self, method: str, path: str, fields: dict[str, Any] | None = None) -> httpx.Response:
        try:
            response = self._http_client.request(method, path, json=fields)
        except httpx.RequestError as error:
            raise CallNotSent(f"the provider could not be asked about webhooks: {type(error).__name__}") from error
        if response.status_code in (401, 403):
            raise CallRejected(
                response.status_code,
                Reason.NOT_AUTHORIZED,
                "the provider does not accept our API key (PAYREADY_QUILTT_API_KEY)",
            )
        if not response.is_success:
            raise _undocumented_response(response)
        return response


def _undocumented_response(response: httpx.Response) -> CallFailed:
    return CallFailed(f"the provider answered {response.status_code} when asked about webhooks, and not as documented")


def check_subscription(client: SubscriptionsClient, url: str) -> None:
    """See whether the provider still delivers to us; what is wrong is counted, and logged."""
    try:
        found = problems(client.list_all(), url)
    except CallFailed as failure:
        metrics.SUBSCRIPTION_PROBLEMS.set(float("nan"))
        log.warning("the webhook subscription could not be checked: %s", failure)
        return
    metrics.SUBSCRIPTION_PROBLEMS.set(len(found))
    for flaw in found:
        log.warning("webhook subscription: %s; see payready webhooks status", flaw)
