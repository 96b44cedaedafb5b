"""Verification of Quiltt's signatures: the valid form, and every invalid one."""

import base64
import functools
import hashlib
import hmac
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from webhook import signature
from webhook.signature import Malformed, Mismatch, Missing, NoSecret, SignatureRefused, TimestampOutOfTolerance

SECRET = "test_secret"
TIMESTAMP = "1700000000"
NOW = datetime.fromtimestamp(1_700_000_000, UTC)
BODY = b'{"eventTypes":["balance.created"]}'
SIGNATURE = "4V13r7evvdfLlNjoAUr3jO/ScGtoiUAKmmgEEL1GQ/k="

verify = functools.partial(signature.verify, tolerance_s=300)

secret_texts = st.text(min_size=1, max_size=80).filter(lambda secret: secret.strip().strip("\0"))
secret_lists = st.lists(secret_texts, min_size=1, max_size=4, unique=True)
anything = st.none() | st.text(st.characters(), max_size=60)  # st.characters() gives lone surrogates too


def sign(body: bytes, timestamp: str = TIMESTAMP, secret: str = SECRET) -> str:
    """Sign as the provider, by its documentation and not by the code under test."""
    mac = hmac.new(secret.encode(), b"1", hashlib.sha256)
    mac.update(timestamp.encode())
    mac.update(body)
    return base64.b64encode(mac.digest()).decode()


def test_documented_example_is_accepted() -> None:
    """The check vector of the provider's notes verifies."""
    verify(BODY, TIMESTAMP, SIGNATURE, [SECRET], NOW)


@given(body=st.binary(max_size=2_000), secrets=secret_lists, data=st.data())
def test_every_configured_secret_is_valid(body: bytes, secrets: list[str], data: st.DataObject) -> None:
    secret = data.draw(st.sampled_from(secrets))
    verify(body, TIMESTAMP, sign(body, secret=secret), secrets, NOW)


@pytest.mark.parametrize("secrets", [[], [""], ["", " "], ("\t\n",), ["\0\0"]])
def test_everything_is_refused_without_secrets(secrets: list[str]) -> None:
    """Blank secrets count as none, also for signatures with the blank key."""
    blank = secrets[-1] if secrets else ""
    with pytest.raises(NoSecret) as refusal:
        verify(BODY, TIMESTAMP, sign(BODY, secret=blank), secrets, NOW)
    assert refusal.value.reason == "no_secret"


def test_blank_secret_is_skipped() -> None:
    """A trailing comma in a setting does not make the empty string a secret."""
    with pytest.raises(Mismatch):
        verify(BODY, TIMESTAMP, sign(BODY, secret=""), [SECRET, ""], NOW)


@pytest.mark.parametrize(
    ("timestamp", "given_signature"),
    [(None, SIGNATURE), ("", SIGNATURE), (TIMESTAMP, None), (TIMESTAMP, ""), (None, None)],
)
def test_both_headers_are_required(timestamp: str | None, given_signature: str | None) -> None:
    """A header that is absent or empty is refused as missing."""
    with pytest.raises(Missing) as refusal:
        verify(BODY, timestamp, given_signature, [SECRET], NOW)
    assert refusal.value.reason == "missing"


@pytest.mark.parametrize(
    "timestamp",
    [
        "１２３",
        "١٧٠٠٠٠٠٠٠٠",
        "²",
        "1_700_000_000",
        " 1700000000",
        "1700000000\n",
        "+1700000000",
        "-1700000000",
        "1700000000.0",
        "1.7e9",
        "0x6553f100",
        "v1",
        "nan",
        "\x00",
        "\ud800",
        "9" * 13,
        "9" * 5_000,
    ],
)
def test_timestamp_has_only_digits(timestamp: str) -> None:
    """Other forms that int() accepts are malformed, even when they are signed."""
    signed = sign(BODY, timestamp) if timestamp.isprintable() else SIGNATURE
    with pytest.raises(Malformed) as refusal:
        verify(BODY, timestamp, signed, [SECRET], NOW)
    assert refusal.value.reason == "malformed"


@pytest.mark.parametrize(
    "given_signature",
    [
        pytest.param(SIGNATURE.rstrip("="), id="no padding"),
        pytest.param(SIGNATURE + "=", id="too much padding"),
        pytest.param(SIGNATURE.replace("/", "_"), id="the alphabet for addresses"),
        pytest.param(SIGNATURE.replace("k=", "l="), id="another spelling of the same bytes"),
        pytest.param(SIGNATURE + "\n", id="a line end"),
        pytest.param(" " + SIGNATURE, id="a space"),
        pytest.param("sha256=" + SIGNATURE, id="a prefix"),
        pytest.param("v1," + SIGNATURE, id="a version"),
        pytest.param(SIGNATURE + ", " + SIGNATURE, id="two signatures"),
        pytest.param(base64.b64decode(SIGNATURE).hex(), id="hexadecimal"),
        pytest.param(base64.b64encode(bytes(31)).decode(), id="31 bytes"),
        pytest.param(base64.b64encode(bytes(33)).decode(), id="33 bytes"),
        pytest.param("é" * 44, id="not ascii"),
        pytest.param("\ud800" * 44, id="not even text"),
        pytest.param("A" * 1_000_000, id="a million characters"),
    ],
)
def test_signature_has_one_encoding(given_signature: str) -> None:
    """Anything but padded standard base64 of 32 bytes is malformed."""
    with pytest.raises(Malformed):
        verify(BODY, TIMESTAMP, given_signature, [SECRET], NOW)


@pytest.mark.parametrize(
    "message",
    [
        pytest.param(b"v1" + TIMESTAMP.encode() + BODY, id="v1 for 1"),
        pytest.param(b"1." + TIMESTAMP.encode() + b"." + BODY, id="separators"),
        pytest.param(TIMESTAMP.encode() + BODY, id="no version"),
        pytest.param(b"1" + TIMESTAMP.encode() + b'{"eventTypes": ["balance.created"]}', id="json written anew"),
        pytest.param(b"1" + BODY, id="no timestamp"),
    ],
)
def test_other_signature_schemes_do_not_match(message: bytes) -> None:
    """Public integrations sign the wrong message with the right secret."""
    mismatched = base64.b64encode(hmac.digest(SECRET.encode(), message, "sha256")).decode()
    with pytest.raises(Mismatch) as refusal:
        verify(BODY, TIMESTAMP, mismatched, [SECRET], NOW)
    assert refusal.value.reason == "mismatch"


@given(body=st.binary(max_size=500), ours=secret_lists, theirs=secret_texts)
def test_unknown_secret_does_not_match(body: bytes, ours: list[str], theirs: str) -> None:
    """This is independent of the number of configured secrets."""
    # HMAC fills a short key up with zero bytes, so "a" and "a\0" are one key.
    others = [secret for secret in ours if secret.rstrip("\0") != theirs.rstrip("\0")]
    with pytest.raises(Mismatch if others else NoSecret):
        verify(body, TIMESTAMP, sign(body, secret=theirs), others, NOW)


@given(body=st.binary(min_size=1, max_size=500), data=st.data())
def test_flipped_bit_of_body_is_refused(body: bytes, data: st.DataObject) -> None:
    tampered = flip(body, data.draw(st.integers(0, len(body) * 8 - 1)))
    with pytest.raises(Mismatch):
        verify(tampered, TIMESTAMP, sign(body), [SECRET], NOW)


@pytest.mark.parametrize("bit", range(len(SIGNATURE) * 8))
def test_flipped_bit_of_signature_is_refused(bit: int) -> None:
    """Each bit of the header counts, also the bits that a lenient decoder drops."""
    with pytest.raises((Mismatch, Malformed)):
        verify(BODY, TIMESTAMP, flip(SIGNATURE.encode(), bit).decode("latin-1"), [SECRET], NOW)


@pytest.mark.parametrize("bit", range(len(TIMESTAMP) * 8))
def test_flipped_bit_of_timestamp_is_refused(bit: int) -> None:
    """An attacker cannot replay a request with a new timestamp."""
    with pytest.raises((Mismatch, Malformed)):
        verify(BODY, flip(TIMESTAMP.encode(), bit).decode("latin-1"), SIGNATURE, [SECRET], NOW)


@pytest.mark.parametrize("offset_s", [-300, -299.999, -1, 0, 0.5, 299.999, 300])
def test_tolerance_includes_its_limits(offset_s: float) -> None:
    """A timestamp of 300 seconds ago, or 300 seconds ahead of our clock, is valid."""
    verify(BODY, TIMESTAMP, SIGNATURE, [SECRET], NOW + timedelta(seconds=offset_s))


@pytest.mark.parametrize(("offset_s", "age_s"), [(301, 301), (-301, -301), (300.001, 300), (86_400, 86_400)])
def test_timestamp_outside_the_tolerance_is_stale(offset_s: float, age_s: int) -> None:
    """The refusal has the difference in seconds."""
    with pytest.raises(TimestampOutOfTolerance) as refusal:
        verify(BODY, TIMESTAMP, SIGNATURE, [SECRET], NOW + timedelta(seconds=offset_s))
    assert (refusal.value.reason, refusal.value.age_s) == ("stale", age_s)


@given(timestamp=st.from_regex(r"[0-9]{1,12}", fullmatch=True))
@example("0")
@example("9" * 12)
def test_only_valid_signatures_are_stale(timestamp: str) -> None:
    """A forged request is a mismatch at any timestamp."""
    with pytest.raises(Mismatch):
        verify(BODY, timestamp, sign(BODY, timestamp, "a guess"), [SECRET], NOW)
    if abs(int(timestamp) - 1_700_000_000) > 300:
        with pytest.raises(TimestampOutOfTolerance):
            verify(BODY, timestamp, sign(BODY, timestamp), [SECRET], NOW)


def test_tolerance_is_a_parameter() -> None:
    """A larger tolerance accepts a late retry that was not signed again."""
    verify(BODY, TIMESTAMP, SIGNATURE, [SECRET], NOW + timedelta(hours=1), tolerance_s=3_600)


def test_time_zone_of_the_clock_is_irrelevant() -> None:
    verify(BODY, TIMESTAMP, SIGNATURE, [SECRET], NOW.astimezone(timezone(timedelta(hours=14))))


@given(
    body=st.binary(max_size=500),
    timestamp=anything,
    given_signature=anything,
    secrets=st.lists(st.text(max_size=20), max_size=3),
)
@example(b"", TIMESTAMP, SIGNATURE, ["\ud800"])
@example(b"", "9" * 5_000, SIGNATURE, [SECRET])
@example(b"\xff", "１２３", "é", [SECRET])
def test_input_raises_only_signature_refused(
    body: bytes, timestamp: str | None, given_signature: str | None, secrets: list[str]
) -> None:
    with pytest.raises(SignatureRefused) as refusal:
        verify(body, timestamp, given_signature, secrets, NOW)
    assert refusal.value.reason in {"no_secret", "missing", "malformed", "mismatch", "stale"}


@pytest.mark.parametrize(
    ("timestamp", "given_signature"),
    [("170000000A", SIGNATURE), (TIMESTAMP, "secretive" + SIGNATURE), (TIMESTAMP, sign(b"other"))],
)
def test_refusal_repeats_no_input(timestamp: str, given_signature: str) -> None:
    """Its text is safe to log: it has neither a secret nor input."""
    with pytest.raises(SignatureRefused) as refusal:
        verify(BODY, timestamp, given_signature, [SECRET], NOW)
    assert not any(text in str(refusal.value) for text in (SECRET, timestamp, given_signature))


def test_comparisons_take_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each secret costs one compare_digest, also after a match."""
    compared: list[bytes] = []

    def counting(expected: bytes, given_signature: bytes) -> bool:
        compared.append(expected)
        return hmac.compare_digest(expected, given_signature)

    class CountingHmac:
        new = staticmethod(hmac.new)
        compare_digest = staticmethod(counting)

    monkeypatch.setattr(signature, "hmac", CountingHmac)
    verify(BODY, TIMESTAMP, SIGNATURE, [SECRET, "older", "oldest"], NOW)
    assert len(set(compared)) == 3


def test_string_instead_of_secrets_raises_type_error() -> None:
    """Each of its characters would be a secret."""
    with pytest.raises(TypeError, match="must be a list"):
        verify(BODY, TIMESTAMP, sign(BODY, secret="t"), SECRET, NOW)


def test_time_without_zone_raises_value_error() -> None:
    """It would be interpreted in the zone of the machine."""
    with pytest.raises(ValueError, match="time zone"):
        verify(BODY, TIMESTAMP, SIGNATURE, [SECRET], NOW.replace(tzinfo=None))


def flip(data: bytes, bit: int) -> bytes:
    flipped = bytearray(data)
    flipped[bit // 8] ^= 1 << bit % 8
    return bytes(flipped)
