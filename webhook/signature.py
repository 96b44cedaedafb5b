"""Verification of Quiltt's webhook signatures. Pure functions, without I/O.

Quiltt docs: `Quiltt-Timestamp` is Unix seconds in decimal, and `Quiltt-Signature` is
`base64(HMAC-SHA256(secret, "1" + timestamp + body))`. The version is the bare digit, and the parts have no separator.
The secret is the subscription's, not the API key. The body is the received bytes, not JSON that was serialized again.
Requests more than 300 seconds from our clock, in either direction, must be refused.

Every refusal is one of these. Its `reason` is a label for logs and metrics:

    SignatureRefused
     +-- NoSecret                 no_secret  no secret is configured: every request is refused
     +-- Missing                  missing    a header is absent or empty
     +-- Malformed                malformed  a header does not have the documented form
     +-- Mismatch                 mismatch   no configured secret made this signature
     +-- TimestampOutOfTolerance  stale      a configured secret did, but too long ago or ahead of our clock

The signature is checked before the clock, so `stale` is always a genuine Quiltt request: a late retry, or one of the
two clocks is wrong.
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
# 32 bytes are 43 base64 characters and a pad. The last character has four bits, so only these sixteen are canonical: a
# lenient decoder would accept four encodings of one signature.
_SIGNATURE = re.compile(r"[A-Za-z0-9+/]{42}[AEIMQUYcgkosw048]=")


class SignatureRefused(Exception):
    """A request without a valid signature of Quiltt. The text repeats neither input nor a secret."""

    reason: ClassVar[Reason]


class NoSecret(SignatureRefused):
    """No secret is configured."""

    reason = "no_secret"


class Missing(SignatureRefused):
    """A header is absent or empty."""

    reason = "missing"


class Malformed(SignatureRefused):
    """A header does not have the documented form."""

    reason = "malformed"


class Mismatch(SignatureRefused):
    """No configured secret made this signature."""

    reason = "mismatch"


class TimestampOutOfTolerance(SignatureRefused):
    """The timestamp is too far from our clock: `age_s` seconds behind it, or ahead of it if negative."""

    reason = "stale"

    def __init__(self, age_s: int) -> None:
        super().__init__(f"signed {abs(age_s)} s {'behind' if age_s >= 0 else 'ahead of'} our clock")
        self.age_s = age_s


def sign(body: bytes, secret: str, now: datetime) -> dict[str, str]:
    """Return the headers that Quiltt would send with `body`, to test an endpoint."""
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
    *,
    tolerance_s: int,
) -> None:
    """Verify that one of `secrets` signed `body` at `timestamp`, at most `tolerance_s` from `now`.

    With several secrets, the secret of a subscription can be rotated without losing an event.

    Raises:
        SignatureRefused: the signature is not valid. Headers and bodies never raise anything else.
        TypeError: the caller passed one string instead of a list of secrets.
        ValueError: the caller passed a time without a time zone.
    """
    if isinstance(secrets, str):
        raise TypeError("secrets must be a list: each character of a single string would be used as a secret")
    signers = _signers_of_nonblank_secrets(tuple(secrets))
    now_s = _unix_seconds(now)
    if not signers:
        raise NoSecret("no webhook secret is configured")
    if not timestamp or not signature:
        raise Missing(f"{TIMESTAMP_HEADER} and {SIGNATURE_HEADER} are both required")
    if not _TIMESTAMP.fullmatch(timestamp):
        raise Malformed(f"{TIMESTAMP_HEADER} is not Unix seconds in decimal")
    if not _SIGNATURE.fullmatch(signature):
        raise Malformed(f"{SIGNATURE_HEADER} is not base64 of 32 bytes")
    if not _is_signed_by_any(signers, timestamp.encode("ascii"), body, signature.encode("ascii")):
        raise Mismatch("no configured secret made the signature")
    if abs(now_s - int(timestamp)) > tolerance_s:
        raise TimestampOutOfTolerance(round(now_s) - int(timestamp))


@functools.lru_cache(maxsize=8)
def _signers_of_nonblank_secrets(secrets: tuple[str, ...]) -> list[hmac.HMAC]:
    """Return a prepared HMAC for each secret. Preparing a key costs as much as signing with it.

    Blank secrets are skipped, because any sender could sign with an empty key. HMAC pads short keys with zero bytes, so
    a key of zeros equals the empty key.
    """
    return [_signer(secret) for secret in secrets if secret.strip().strip("\0")]


def _signer(secret: str) -> hmac.HMAC:
    # surrogatepass: a secret that is not valid Unicode matches no signature, and must not raise.
    return hmac.new(secret.encode("utf-8", "surrogatepass"), _VERSION, "sha256")


def _unix_seconds(now_with_time_zone: datetime) -> float:
    if now_with_time_zone.utcoffset() is None:
        raise ValueError("now must have a time zone")
    return now_with_time_zone.timestamp()


def _is_signed_by_any(signers: list[hmac.HMAC], timestamp: bytes, body: bytes, signature: bytes) -> bool:
    """Compare with every key in constant time, so that the duration reveals nothing about the keys."""
    signed = False
    for signer in signers:
        expected = signer.copy()
        expected.update(timestamp + body)
        signed |= hmac.compare_digest(base64.b64encode(expected.digest()), signature)
    return signed
