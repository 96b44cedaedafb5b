"""Our webhook subscription at the provider: what it must be, whether it is, and the calls that make it so.

None of these calls is charged. What a subscription's secret is, only the provider's dashboard tells.
"""

import logging
from collections.abc import Sequence
from typing import Annotated, Any, Self

import httpx
from pydantic import BaseModel, ConfigDict, Field, SecretStr, TypeAdapter, ValidationError

from worker import metrics
from worker.errors import CallFailed, Reason, Refused, Unsent

log = logging.getLogger(__name__)

EVENT_TYPES = (
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

    def flaws(self) -> list[str]:
        """What keeps it from doing what it is for."""
        found = [f"{self.id} is disabled"] if self.disabled else []
        missing = [kind for kind in EVENT_TYPES if kind not in self.event_types]
        return found + ([f"{self.id} leaves out {', '.join(missing)}"] if missing else [])


_LIST = TypeAdapter(list[Subscription])


def to_us(found: Sequence[Subscription], url: str) -> list[Subscription]:
    """Those that deliver to `url`, the one that does it best first; while a secret is rotated there are two."""
    return sorted((one for one in found if one.target_url == url), key=lambda one: (len(one.flaws()), one.id))


def flaws(found: Sequence[Subscription], url: str) -> list[str]:
    """What is wrong with our subscription; nothing if one of those that deliver to `url` does all that is needed."""
    insecure = [] if url.startswith("https://") else [f"{url} is not https"]
    ours = to_us(found, url)
    return insecure + (ours[0].flaws() if ours else [f"no subscription delivers to {url}"])


class Subscriptions:
    """The provider's subscriptions, for as long as a question takes; to be closed.

    Every method raises `Refused` if our key is wrong, `Unsent` if the provider could not be asked, and `CallFailed`
    if it answered something that its documentation does not have.
    """

    def __init__(self, api_url: str, api_key: SecretStr, *, connect_timeout_s: float, read_timeout_s: float) -> None:
        self._http = httpx.Client(
            base_url=api_url.rstrip("/") + "/v1/webhooks",
            headers={"Authorization": f"Bearer {api_key.get_secret_value()}"},
            timeout=httpx.Timeout(connect_timeout_s, read=read_timeout_s),
            follow_redirects=False,
            trust_env=False,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def all(self) -> list[Subscription]:
        """Every subscription of the key's environment."""
        answer = self._ask("GET", "/subscriptions")
        try:
            return _LIST.validate_json(answer.content)
        except ValidationError:
            raise _undocumented(answer) from None

    def create(self, url: str) -> Subscription:
        """Have our events delivered to `url`."""
        given = {"name": "payready", "targetUrl": url, "eventTypes": list(EVENT_TYPES), "disabled": False}
        return self._one("POST", "/subscriptions", given)

    def mend(self, one: Subscription) -> Subscription:
        """Enable a subscription, and add what it leaves out. What it has beyond that stays."""
        return self.change(one, disabled=False, eventTypes=list(dict.fromkeys([*one.event_types, *EVENT_TYPES])))

    def change(self, one: Subscription, **given: Any) -> Subscription:
        """Change some of a subscription's fields."""
        return self._one("PATCH", f"/subscriptions/{one.id}", given)

    def delete(self, one: Subscription) -> None:
        """Have nothing more delivered by this subscription."""
        self._ask("DELETE", f"/subscriptions/{one.id}")

    def _one(self, method: str, path: str, given: dict[str, Any]) -> Subscription:
        answer = self._ask(method, path, given)
        try:
            return Subscription.model_validate_json(answer.content)
        except ValidationError:
            raise _undocumented(answer) from None

    def _ask(self, method: str, path: str, given: dict[str, Any] | None = None) -> httpx.Response:
        try:
            answer = self._http.request(method, path, json=given)
        except httpx.RequestError as error:
            raise Unsent(f"the provider could not be asked about webhooks: {type(error).__name__}") from error
        if answer.status_code in (401, 403):
            raise Refused(
                answer.status_code,
                Reason.NOT_AUTHORIZED,
                "the provider does not accept our API key (PAYREADY_QUILTT_API_KEY)",
            )
        if not answer.is_success:
            raise _undocumented(answer)
        return answer


def _undocumented(answer: httpx.Response) -> CallFailed:
    return CallFailed(f"the provider answered {answer.status_code} when asked about webhooks, and not as documented")


def check(provider: Subscriptions, url: str) -> None:
    """See whether the provider still delivers to us; what is wrong is counted, and logged."""
    try:
        found = flaws(provider.all(), url)
    except CallFailed as failure:
        metrics.FLAWS.note(float("nan"))
        log.warning("the webhook subscription could not be checked: %s", failure)
        return
    metrics.FLAWS.note(len(found))
    for flaw in found:
        log.warning("webhook subscription: %s; see payready webhooks status", flaw)
