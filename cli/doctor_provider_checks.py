"""Checks of `payready doctor` about the provider: API key and price, calls, webhook, subscription, fee caps."""

from collections.abc import Iterator, Mapping
from datetime import timedelta

from cli.doctor_results import CheckContext, CheckResult, error, ok, warning
from cli.webhook_probe import find_problem_by_test_delivery
from config.production_rules import DEMO_SECRET_PREFIX
from config.role_settings import is_set
from webhook.paths import PATH
from worker.correlation.redis_client import REDIS_UNAVAILABLE
from worker.errors import CallFailed, CallRejected
from worker.ledger import balance_report, metrics_queries, schema
from worker.ledger.balances import RejectionReason
from worker.ledger.engine import DATABASE_UNAVAILABLE, Tx, read_snapshot
from worker.ledger_metrics import used_ratios_of_set_day_and_month_caps
from worker.quiltt import subscriptions
from worker.rules.decimals import amount_with_currency_text, count_text
from worker.rules.pricing import PriceListError
from worker.rules.states import RefreshState
from worker.rules.times import utc_time_text
from worker.runtime import subscriptions_client

CAP_WARNING_RATIO = 0.9
CALLS_LOOKBACK = timedelta(minutes=15)
"""Only calls of this time are counted, without calls whose balance may still arrive."""
REJECTED_LOOKBACK = timedelta(hours=3)
"""Only balances of this time are counted as rejected."""
MISSING_WARNING_RATIO = 0.1
"""Share of calls without a balance that is a warning."""
MISSING_ERROR_RATIO = 0.5
"""Share of calls without a balance that is an error."""
_MISSING_BALANCES_FIX = (
    "fix `webhook` and `subscription` above, if they fail; else search the log of `web` for `webhook.delivery`: "
    "result=mismatch is a wrong PAYREADY_WEBHOOK_SECRETS, result=stale a wrong clock; "
    "without any such event, check the proxy"
)
_REJECTION_TEXTS: Mapping[RejectionReason, str] = {
    "too_old": "older than the payments allow",
    "after_deadline": "after the payments' deadlines",
}
_REJECTION_FIXES: Mapping[RejectionReason, str] = {
    "too_old": "see the times in `payready payment show`; if `at` is the bank's time, set "
    "PAYREADY_REFRESH_BALANCE_TIME=arrival, else compare the clocks",
    "after_deadline": "raise `timeout_s` in the jobs above the delay of the balances",
}


def check_api_key_mode_and_price(context: CheckContext) -> Iterator[CheckResult]:
    """Check that the provider accepts the API key, its environment is the intended one, and its calls have a price."""
    settings, rt = context.settings, context.rt
    if _lacks_api_key(context):
        fix = "run the doctor with the settings of `refresh`, which has PAYREADY_QUILTT_API_KEY"
        yield warning("api key", "not checked: it is not set here", fix)
        return
    try:
        mode = rt.provider.introspect_api_key()
    except CallRejected as rejected:
        yield error(
            "api key", str(rejected), "set PAYREADY_QUILTT_API_KEY to a valid secret, restart `refresh` and `worker`"
        )
        return
    except CallFailed as failure:
        via = " through PAYREADY_QUILTT_PROXY_URL" if settings.quiltt_proxy_url else ""
        yield error("api key", str(failure), f"check that this host can reach PAYREADY_QUILTT_AUTH_URL{via}")
        return
    yield ok("api key", f"accepted, mode {mode}")
    if not settings.permits_api_key_mode(mode):
        yield error(
            "api key", "its calls are billed, but PAYREADY_ENV is development", "set PAYREADY_ENV, or a test key"
        )
    elif mode != "PRODUCTION" and settings.env == "production":
        yield warning("api key", f"its mode is {mode}, but PAYREADY_ENV is production", "set PAYREADY_QUILTT_API_KEY")
    yield from _check_price_known(context, mode)


def _lacks_api_key(context: CheckContext) -> bool:
    """Return whether this environment is of a production role that gets no API key."""
    return context.settings.env == "production" and not is_set(context.settings, "quiltt_api_key")


def _check_price_known(context: CheckContext, mode: str) -> Iterator[CheckResult]:
    settings, rt = context.settings, context.rt
    try:
        price = rt.price_list.price_for(mode, rt.clock().date())
    except PriceListError as problem:
        yield error("price", f"{problem}; payready makes no calls", f"add the price to {settings.price_list_file}")
        return
    amount = amount_with_currency_text(price.per_call, price.currency)
    yield ok("price", f"{amount} per call, price list {price.price_list}")


def check_circuit_breaker(context: CheckContext) -> Iterator[CheckResult]:
    """Check that the circuit breaker is closed."""
    try:
        open_until = context.rt.admission.status(context.rt.clock()).open_until
    except REDIS_UNAVAILABLE:
        return  # check_redis reports it
    if open_until is not None:
        message = f"the circuit breaker is open: no calls until {utc_time_text(open_until)}, then one probe"
        yield error("calls", message, "search the log of `refresh` for `circuit_breaker.opened`; ask Quiltt")


def check_fee_caps_and_missing_balances(context: CheckContext) -> Iterator[CheckResult]:
    """Check how far fee caps are used, how many calls brought no balance, and which balances were rejected."""
    try:
        with read_snapshot(context.rt.engine) as tx:
            if schema.current_revision(tx) == schema.required_revision():
                yield from _check_usage_of_fee_caps(context, tx)
                yield from _check_recent_calls_without_balance(context, tx)
                yield from rejected_balances_results(
                    balance_report.rejected_counts(tx, context.rt.clock() - REJECTED_LOOKBACK)
                )
    except DATABASE_UNAVAILABLE:
        return  # check_database reports it


def _check_usage_of_fee_caps(context: CheckContext, tx: Tx) -> Iterator[CheckResult]:
    for cap, used_ratio in used_ratios_of_set_day_and_month_caps(context.rt, tx, context.rt.clock()).items():
        message = f"{used_ratio:.0%} of the cap per {cap} is used"
        if used_ratio >= CAP_WARNING_RATIO:
            fix = f"raise PAYREADY_FEE_CAP_PER_{cap.upper()}; at 100 % payments fail with fee_cap_reached"
            yield error("fee cap", message, fix)
        else:
            yield ok("fee cap", message)


def _check_recent_calls_without_balance(context: CheckContext, tx: Tx) -> Iterator[CheckResult]:
    now = context.rt.clock()
    after, until = now - CALLS_LOOKBACK, now - timedelta(seconds=context.settings.refresh_window_s)
    counts = metrics_queries.call_counts_by_refresh_state(tx, after, until)
    answered = counts.get(RefreshState.ANSWERED, 0)
    unanswered = sum(counts.get(state, 0) for state in balance_report.UNANSWERED_STATES)
    rejected = balance_report.count_unanswered_calls_with_rejected_balance(tx, after, until)
    if answered or unanswered:
        yield balances_result(answered=answered + rejected, missing=unanswered - rejected)


def balances_result(*, answered: int, missing: int) -> CheckResult:
    """Judge the share of accepted calls without a balance: a warning from 10 %, an error above 50 %.

    A call whose balance was rejected is not missing: `rejected_balances_results` reports it.
    """
    calls = answered + missing
    message = f"{missing} of {count_text(calls, 'call')} accepted in the last 15 min brought no balance"
    if missing > MISSING_ERROR_RATIO * calls:
        return error("balances", message, _MISSING_BALANCES_FIX)
    if missing >= MISSING_WARNING_RATIO * calls:
        return warning("balances", message, _MISSING_BALANCES_FIX)
    return ok("balances", message)


def rejected_balances_results(counts: Mapping[RejectionReason, int]) -> Iterator[CheckResult]:
    """Report the balances that arrived and resolved no payment of their call, one warning per reason."""
    for reason, count in counts.items():
        arrived = f"{count_text(count, 'balance')} of the last 3 h arrived {_REJECTION_TEXTS[reason]}"
        yield warning("rejected balances", f"{arrived} ({reason})", _REJECTION_FIXES[reason])


def check_web_accepts_signed_delivery(context: CheckContext) -> Iterator[CheckResult]:
    """Send `web` a signed delivery without events: it must respond 204, so it is reachable and has these secrets."""
    if not context.settings.webhook_secrets:
        return  # check_webhook_secrets reports it
    url = f"{context.web_url.rstrip('/')}{PATH}"
    problem = find_problem_by_test_delivery(url, context.settings, context.rt.clock())
    if problem is None:
        yield ok("webhook", f"{url} accepts a delivery signed with the first secret")
    elif problem.is_unreachable_from_here:
        yield warning("webhook", problem.message, "start the role `web`, or give its address with --web")
    else:
        yield error("webhook", problem.message, problem.fix)


def check_public_webhook_address(context: CheckContext) -> Iterator[CheckResult]:
    """Send the same to the address to which the provider delivers: the proxy in front may change path or body."""
    url = context.settings.webhook_url
    if url is None or not context.settings.webhook_secrets:
        return  # check_subscription and check_webhook_secrets report it
    problem = find_problem_by_test_delivery(url, context.settings, context.rt.clock())
    if problem is None:
        yield ok("webhook address", f"{url} accepts a delivery signed with the first secret")
    elif problem.is_unreachable_from_here:
        yield warning("webhook address", problem.message, problem.fix)
    else:
        yield error("webhook address", problem.message, problem.fix)


def check_subscription(context: CheckContext) -> Iterator[CheckResult]:
    """Check that the provider has an enabled subscription with all required event types."""
    url = context.settings.webhook_url
    if url is None:
        yield warning("subscription", "not checked", "set PAYREADY_WEBHOOK_URL to the public address of `web`")
        return
    if _lacks_api_key(context):
        return  # check_api_key_mode_and_price reports it
    try:
        with subscriptions_client(context.settings) as provider:
            problems = subscriptions.find_problems_of_best_subscription(provider.list_all(), url)
    except CallFailed as failure:
        yield error("subscription", str(failure), "fix `api key` first, if it fails")
        return
    for problem in problems:
        yield error("subscription", problem, "run `payready webhooks subscribe`")
    if not problems:
        yield ok("subscription", f"delivers to {url}")


def check_webhook_secrets(context: CheckContext) -> Iterator[CheckResult]:
    """Check that webhook secrets are set, and none is the demo's."""
    secrets = [secret.get_secret_value() for secret in context.settings.webhook_secrets]
    if not secrets and context.settings.env == "production":  # `web` does not start without
        fix = "run the doctor with the settings of `web`, which has PAYREADY_WEBHOOK_SECRETS"
        yield warning("webhook secrets", "not checked: none is set here", fix)
    elif not secrets:
        fix = "set PAYREADY_WEBHOOK_SECRETS, restart `web`"
        yield error("webhook secrets", "none is set: `web` rejects every delivery", fix)
    elif any(secret.startswith(DEMO_SECRET_PREFIX) for secret in secrets):
        fix = "set PAYREADY_WEBHOOK_SECRETS before production"
        yield warning("webhook secrets", "one is the demo's", fix)
    else:
        rotation = ", as during a rotation" if len(secrets) > 1 else ""
        yield ok("webhook secrets", f"{len(secrets)} set{rotation}")
