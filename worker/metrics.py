"""What a process counts, for Prometheus. What the ledger can tell is asked of the ledger, not counted here.

Each role is one process with threads, so the library's plain registry is right; replicas are summed by Prometheus.
Names begin with `payready_`, and no label is open-ended: never an account, never a payment.
"""

from prometheus_client import Counter, Gauge

CALLS = Counter("payready_provider_calls", "Calls made to the provider, by how they ended.", ["result"])
"""`accepted`, `refused`, `throttled`, `unsent`, `uncertain`."""

DELIVERIES = Counter("payready_webhook_deliveries", "Deliveries at the webhook, each once, by result.", ["result"])
"""Answered 2xx: `routine` (nothing in it was ours), `matched` (it brought a REFRESH balance), `connection` (it
brought no more than word of a connection or a profile), `quarantined` (it brought
an event that nobody understood, and maybe balances too). `unsafe`: 503, it could not be kept now. All else was
refused: `stale` (rightly signed, at another time), `mismatch`, `missing`, `malformed`, `no_secret` (401),
`content_type` (415), `too_large` (413), `too_slow` (408), `cut_off`, `no_delivery`, `unreadable` (400)."""

EVENTS = Counter("payready_webhook_events", "Events of rightly signed deliveries, by what became of them.", ["result"])
"""`routine` (not ours), `matched` (a REFRESH balance), `connection`, `quarantined`, `unreadable` (not even JSON)."""

SUBSCRIPTION = Gauge(
    "payready_webhook_subscription_flaws",
    "What is wrong with our webhook subscription at the provider, by the last check that this process made.",
)
"""0: nothing; NaN: not known. Only workers check, one at a time; where there are several, look at the greatest."""
SUBSCRIPTION.set(float("nan"))
HELD_BACK = Counter("payready_calls_held_back", "Calls that had to wait for leave to go out.", ["why"])
"""`full`: the budget of calls per second is spent. `shut`: the breaker is open."""
BREAKER_OPENED = Counter("payready_breaker_opened", "How often calls were stopped, as the provider only failed.")
READS = Counter("payready_balance_reads", "Free reads of a balance before a deadline, by what they gave.", ["result"])
"""`found`, `nothing`, `failed`."""
