"""What a process counts, for Prometheus. What the ledger can tell is asked of the ledger, not counted here.

Each role is one process with threads, so the library's plain registry is right; replicas are summed by Prometheus.
Names begin with `payready_`, and no label is open-ended: never an account, never a payment.
"""

from prometheus_client import Counter

CALLS = Counter("payready_provider_calls", "Calls made to the provider, by how they ended.", ["result"])
"""`accepted`, `refused`, `throttled`, `unsent`, `uncertain`."""
HELD_BACK = Counter("payready_calls_held_back", "Calls that had to wait for leave to go out.", ["why"])
"""`full`: the budget of calls per second is spent. `shut`: the breaker is open."""
BREAKER_OPENED = Counter("payready_breaker_opened", "How often calls were stopped, as the provider only failed.")
READS = Counter("payready_balance_reads", "Free reads of a balance before a deadline, by what they gave.", ["result"])
"""`found`, `nothing`, `failed`."""
CAPS_REACHED = Counter("payready_fee_caps_reached", "Calls that were not made because of a cap.", ["cap"])
CAPS_NEAR = Counter("payready_fee_caps_near", "Times that a cap was used to four fifths.", ["cap"])
"""`day`, `month`, `account`."""
