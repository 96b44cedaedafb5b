"""Does this request come from Quiltt? Pure: bytes, headers, secrets and a clock in; nothing, or a refusal, out.

Quiltt docs: `Quiltt-Timestamp` is Unix seconds in decimal, and `Quiltt-Signature` is
`base64(HMAC-SHA256(secret, "1" + timestamp + body))`: the version is the bare digit, nothing stands between the
parts, the secret is the subscription's (not the API key), and the body is the bytes as they came, never JSON written
anew. Requests more than 300 seconds away from our clock, in either direction, are to be refused.

Every refusal is one of these, and its `reason` is a word fit for a log line or a metric label:

    SignatureRefused
     +-- NoSecret     no_secret    we hold no secret: everything is refused, nothing is waved through
     +-- Missing      missing      a header is absent or empty
     +-- Malformed    malformed    a header is not of the documented shape
     +-- Mismatch     mismatch     none of our secrets made this signature
     +-- Stale        stale        one of our secrets did, but too long ago or ahead of our clock

The signature is checked before the clock, so `stale` is only ever a real Quiltt request: a late retry, or a clock
that is wrong.
"""

import base64
import functools
import hmac
import re
from collections.abc import Sequence
from datetime import datetime
from typing import ClassVar, Literal

TIMESTAMP_HEADER = "Quiltt-Timestamp"
SIGNATURE_HEADER = "Quiltt-Signature"

Reason = Literal["no_secret", "missing", "malformed", "mismatch", "stale"]

_VERSION = b"1"
# Ten digits until the year 2286; the bound keeps int() cheap and its result a time.
_TIMESTAMP = re.compile(r"[0-9]{1,12}")
# 32 bytes fill 43 characters and a pad. The last character carries four bits, so only these sixteen can stand there: a
# decoder that takes the others too gives one signature four spellings.
_SIGNATURE = re.compile(r"[A-Za-z0-9+/]{42}[AEIMQUYcgkosw048]=")


class SignatureRefused(Exception):
    """The request is not known to come from Quiltt. Its text repeats nothing of what the sender sent, nor a secret."""

    reason: ClassVar[Reason]


class NoSecret(SignatureRefused):
    """We hold no secret to check with."""

    reason = "no_secret"


class Missing(SignatureRefused):
    """A header is absent or empty."""

    reason = "missing"


class Malformed(SignatureRefused):
    """A header is not of the documented shape."""

    reason = "malformed"


class Mismatch(SignatureRefused):
    """None of our secrets made this signature."""

    reason = "mismatch"


class Stale(SignatureRefused):
    """``age_s`` is how far the request lies behind our clock; negative when it lies ahead."""

    reason = "stale"

    def __init__(self, age_s: int) -> None:
        super().__init__(f"signed {abs(age_s)} s {'before' if age_s >= 0 else 'after'} the time that it is here")
        self.age_s = age_s


def sign(body: bytes, secret: str, now: datetime) -> dict[str, str]:
    """The headers that Quiltt would send with `body`: with them the endpoint can be tried."""
    timestamp = str(int(_unix_seconds(now)))
    signer = _signer(secret).copy()
    signer.update(timestamp.encode() + body)
    return {TIMESTAMP_HEADER: timestamp, SIGNATURE_HEADER: base64.b64encode(signer.digest()).decode()}


def verify(
    body: bytes,
    timestamp: str | None,
    signature: str | None,
    secrets: Sequence[str],
    now: datetime,
    tolerance_s: int = 300,
) -> None:
    """Return if one of `secrets` signed `body` at `timestamp`, close enough to `now`; raise `SignatureRefused` if not.

    Several secrets let a subscription's secret be changed without losing an event. No header or body raises anything
    else; `TypeError` and `ValueError` are for the caller's own mistakes: one string for the list of secrets, a clock
    without a zone.
    """
    if isinstance(secrets, str):
        raise TypeError("secrets must be a list of secrets: each character of a lone string would pass for one")
    signers = _signers(tuple(secrets))
    now_s = _unix_seconds(now)
    if not signers:
        raise NoSecret("no webhook secret is configured")
    if not timestamp or not signature:
        raise Missing(f"{TIMESTAMP_HEADER} and {SIGNATURE_HEADER} are both needed")
    if not _TIMESTAMP.fullmatch(timestamp):
        raise Malformed(f"{TIMESTAMP_HEADER} is not Unix seconds in decimal")
    if not _SIGNATURE.fullmatch(signature):
        raise Malformed(f"{SIGNATURE_HEADER} is not base64 of 32 bytes")
    if not _is_signed_by_any(signers, timestamp.encode("ascii"), body, signature.encode("ascii")):
        raise Mismatch("the signature was made with no secret of ours")
    if abs(now_s - int(timestamp)) > tolerance_s:
        raise Stale(round(now_s) - int(timestamp))


@functools.lru_cache(maxsize=8)
def _signers(secrets: tuple[str, ...]) -> list[hmac.HMAC]:
    """What every signature begins with, for each secret; to prepare a key costs as much as to sign with it.

    Blank secrets are left out: an empty key signs as well as any other, and everybody has it. HMAC fills a short key up
    with zero bytes, so a key of nothing but zeros is the empty key again.
    """
    return [_signer(secret) for secret in secrets if secret.strip().strip("\0")]


def _signer(secret: str) -> hmac.HMAC:
    # Any str is a key: surrogatepass, for a secret that is no valid text signs nothing, and must not break the door.
    return hmac.new(secret.encode("utf-8", "surrogatepass"), _VERSION, "sha256")


def _unix_seconds(now: datetime) -> float:
    if now.utcoffset() is None:
        raise ValueError("now must carry a time zone")
    return now.timestamp()


def _is_signed_by_any(signers: list[hmac.HMAC], timestamp: bytes, body: bytes, signature: bytes) -> bool:
    """Try every one, matched or not, in the same time: how long the answer takes says nothing about the keys."""
    signed = False
    for signer in signers:
        made = signer.copy()
        made.update(timestamp + body)
        signed |= hmac.compare_digest(base64.b64encode(made.digest()), signature)
    return signed
