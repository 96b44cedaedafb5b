"""The webhook subscriptions at the provider: their problems, and a client to list, create, repair and delete them.

None of these requests costs a fee. The API never returns a subscription's secret; only the provider's dashboard shows
it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Self

import httpx
from pydantic import BaseModel, ConfigDict, Field, SecretStr, TypeAdapter, ValidationError

from config.log_config import get_logger
from worker import metrics
from worker.errors import CallFailed, CallNotSent
from worker.quiltt import bounded_responses
from worker.quiltt.connecting import proxy_or_none, trusted_certificates
from worker.quiltt.messages import REQUIRED_EVENT_TYPES
from worker.quiltt.responses import error_class_as_words, raise_if_key_rejected

log = get_logger(__name__)


class Subscription(BaseModel):
    """A webhook subscription."""

    model_config = ConfigDict(frozen=True, extra="ignore", hide_input_in_errors=True)

    id: str
    name: str = ""
    target_url: Annotated[str, Field(alias="targetUrl")]
    event_types: Annotated[tuple[str, ...], Field(alias="eventTypes")]
    disabled: bool = False

    def describe_disabled_and_missing_events(self) -> list[str]:
        """Return what is wrong with the subscription, empty if nothing."""
        disabled = [f"{self.id} is disabled"] if self.disabled else []
        missing = [event_type for event_type in REQUIRED_EVENT_TYPES if event_type not in self.event_types]
        return disabled + ([f"{self.id} lacks the events {', '.join(missing)}"] if missing else [])


_SUBSCRIPTION_LIST = TypeAdapter(list[Subscription])


def filter_by_url_fewest_problems_first(subscriptions: Sequence[Subscription], url: str) -> list[Subscription]:
    """Return the subscriptions that deliver to `url`, the one with the fewest problems first.

    During the rotation of a webhook secret there are two.
    """
    ours = (subscription for subscription in subscriptions if subscription.target_url == url)
    return sorted(
        ours, key=lambda subscription: (len(subscription.describe_disabled_and_missing_events()), subscription.id)
    )


def find_problems_of_best_subscription(subscriptions: Sequence[Subscription], url: str) -> list[str]:
    """Return the problems of the subscription for `url`, empty if one subscription has none."""
    insecure = [] if url.startswith("https://") else [f"{url} is not https"]
    ours = filter_by_url_fewest_problems_first(subscriptions, url)
    return insecure + (
        ours[0].describe_disabled_and_missing_events() if ours else [f"no subscription delivers to {url}"]
    )


class SubscriptionsClient:
    """A client for the provider's subscriptions. Use it as a context manager.

    Every method raises `CallRejected` if the provider does not accept the API key, `CallNotSent` without a response,
    and `CallFailed` for a response that is not documented.
    """

    def __init__(
        self,
        api_url: str,
        api_key: SecretStr,
        *,
        connect_timeout_s: float,
        read_timeout_s: float,
        proxy_url: str | None = None,
        ca_file: Path | None = None,
    ) -> None:
        ssl_context = trusted_certificates(ca_file)
        self._read_timeout_s = read_timeout_s
        self._http_client = httpx.Client(
            base_url=api_url.rstrip("/") + "/v1/webhooks",
            headers={"Authorization": f"Bearer {api_key.get_secret_value()}"},
            timeout=httpx.Timeout(connect_timeout_s, read=read_timeout_s),
            follow_redirects=False,
            verify=ssl_context,
            proxy=proxy_or_none(proxy_url, ssl_context),
            trust_env=False,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http_client.close()

    def list_all(self) -> list[Subscription]:
        """Return all subscriptions of the API key's environment."""
        response = self._request("GET", "/subscriptions")
        try:
            return _SUBSCRIPTION_LIST.validate_json(response.content)
        except ValidationError:
            raise _undocumented_response_error(response) from None

    def create(self, url: str) -> Subscription:
        """Create a subscription that delivers the required events to `url`."""
        fields = {"name": "payready", "targetUrl": url, "eventTypes": list(REQUIRED_EVENT_TYPES), "disabled": False}
        return self._request_subscription("POST", "/subscriptions", fields)

    def enable_and_add_missing_events(self, subscription: Subscription) -> Subscription:
        """Enable a subscription, and add the required events that it lacks. Keep its other events."""
        return self.update(
            subscription,
            disabled=False,
            eventTypes=list(dict.fromkeys([*subscription.event_types, *REQUIRED_EVENT_TYPES])),
        )

    def update(self, subscription: Subscription, **fields: Any) -> Subscription:
        """Change fields of a subscription."""
        return self._request_subscription("PATCH", f"/subscriptions/{subscription.id}", fields)

    def delete(self, subscription: Subscription) -> None:
        """Delete a subscription. The provider delivers no more events for it."""
        self._request("DELETE", f"/subscriptions/{subscription.id}")

    def _request_subscription(self, method: str, path: str, fields: dict[str, Any]) -> Subscription:
        response = self._request(method, path, fields)
        try:
            return Subscription.model_validate_json(response.content)
        except ValidationError:
            raise _undocumented_response_error(response) from None

    def _request(self, method: str, path: str, fields: dict[str, Any] | None = None) -> httpx.Response:
        try:
            response = bounded_responses.request(
                self._http_client, method, path, body_timeout_s=self._read_timeout_s, json=fields
            )
        except httpx.RequestError as error:
            raise CallNotSent(f"webhook subscriptions could not be requested: {error_class_as_words(error)}") from error
        raise_if_key_rejected(response)
        if not response.is_success:
            raise _undocumented_response_error(response)
        return response


def _undocumented_response_error(response: httpx.Response) -> CallFailed:
    return CallFailed(f"webhook subscriptions: HTTP {response.status_code} with a response that is not documented")


def log_subscription_problems_and_set_metric(client: SubscriptionsClient, url: str) -> None:
    """Check the subscription for `url`. Log each problem, and set the metric to their number, NaN if unknown."""
    try:
        found = find_problems_of_best_subscription(client.list_all(), url)
    except CallFailed as error:
        metrics.SUBSCRIPTION_PROBLEMS.set(float("nan"))
        log.warning("webhook_subscription.check_failed", error=str(error))
        return
    metrics.SUBSCRIPTION_PROBLEMS.set(len(found))
    for problem in found:
        log.warning("webhook_subscription.problem", problem=problem)
