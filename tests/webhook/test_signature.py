"""Who may speak to the door: what a Quiltt signature is, and every way of not being one."""

import base64
import hashlib
import hmac
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from webhook import signature
from webhook.signature import Malformed, Mismatch, Missing, NoSecret, SignatureRefused, Stale, verify

SECRET = "test_secret"
TIMESTAMP = "1700000000"
NOW = datetime.fromtimestamp(1_700_000_000, UTC)
BODY = b'{"eventTypes":["balance.created"]}'
SIGNATURE = "4V13r7evvdfLlNjoAUr3jO/ScGtoiUAKmmgEEL1GQ/k="

secret_texts = st.text(min_size=1, max_size=80).filter(lambda secret: secret.strip().strip("\0"))
secret_lists = st.lists(secret_texts, min_size=1, max_size=4, unique=True)
anything = st.none() | st.text(st.characters(), max_size=60)  # st.characters() gives lone surrogates too


def sign(body: bytes, timestamp: str = TIMESTAMP, secret: str = SECRET) -> str:
    """The sender's side, written from the documentation and not from the code under test."""
    mac = hmac.new(secret.encode(), b"1", hashlib.sha256)
    mac.update(timestamp.encode())
    mac.update(body)
    return base64.b64encode(mac.digest()).decode()


def test_the_documented_example_is_accepted() -> None:
    """The check vector of the provider's notes verifies."""
    verify(BODY, TIMESTAMP, SIGNATURE, [SECRET], NOW)


@given(body=st.binary(max_size=2_000), secrets=secret_lists, data=st.data())
def test_any_of_our_secrets_may_sign(body: bytes, secrets: list[str], data: st.DataObject) -> None:
    """A right signature verifies, whichever of the configured secrets made it."""
    secret = data.draw(st.sampled_from(secrets))
    verify(body, TIMESTAMP, sign(body, secret=secret), secrets, NOW)


@pytest.mark.parametrize("secrets", [[], [""], ["", " "], ("\t\n",), ["\0\0"]])
def test_without_a_secret_everything_is_refused(secrets: list[str]) -> None:
    """No secret, or only blank ones, opens the door to nobody, not even to who signs with the blank."""
    blank = secrets[-1] if secrets else ""
    with pytest.raises(NoSecret) as refusal:
        verify(BODY, TIMESTAMP, sign(BODY, secret=blank), secrets, NOW)
    assert refusal.value.reason == "no_secret"


def test_a_blank_among_the_secrets_is_no_secret() -> None:
    """A trailing comma in a setting does not make the empty string a secret."""
    with pytest.raises(Mismatch):
        verify(BODY, TIMESTAMP, sign(BODY, secret=""), [SECRET, ""], NOW)


@pytest.mark.parametrize(
    ("timestamp", "given_signature"),
    [(None, SIGNATURE), ("", SIGNATURE), (TIMESTAMP, None), (TIMESTAMP, ""), (None, None)],
)
def test_both_headers_are_needed(timestamp: str | None, given_signature: str | None) -> None:
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
def test_a_timestamp_is_plain_digits(timestamp: str) -> None:
    """What int() might also read, or choke on, is malformed, even when it is signed."""
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
def test_a_signature_has_one_spelling(given_signature: str) -> None:
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
def test_another_recipe_does_not_match(message: bytes) -> None:
    """The mistakes of public integrations, made with the right secret, are mismatches."""
    made = base64.b64encode(hmac.digest(SECRET.encode(), message, "sha256")).decode()
    with pytest.raises(Mismatch) as refusal:
        verify(BODY, TIMESTAMP, made, [SECRET], NOW)
    assert refusal.value.reason == "mismatch"


@given(body=st.binary(max_size=500), ours=secret_lists, theirs=secret_texts)
def test_a_strangers_secret_does_not_match(body: bytes, ours: list[str], theirs: str) -> None:
    """A signature made with a secret that is not ours is a mismatch, however many are ours."""
    # HMAC fills a short key up with zero bytes, so "a" and "a\0" are one key.
    strangers = [secret for secret in ours if secret.rstrip("\0") != theirs.rstrip("\0")]
    with pytest.raises(Mismatch if strangers else NoSecret):
        verify(body, TIMESTAMP, sign(body, secret=theirs), strangers, NOW)


@given(body=st.binary(min_size=1, max_size=500), data=st.data())
def test_a_flipped_bit_of_the_body_is_refused(body: bytes, data: st.DataObject) -> None:
    """One bit of the body changed on the way is a mismatch."""
    tampered = flip(body, data.draw(st.integers(0, len(body) * 8 - 1)))
    with pytest.raises(Mismatch):
        verify(tampered, TIMESTAMP, sign(body), [SECRET], NOW)


@pytest.mark.parametrize("bit", range(len(SIGNATURE) * 8))
def test_a_flipped_bit_of_the_signature_is_refused(bit: int) -> None:
    """Each single bit of the signature header counts, also those that a lenient decoder drops."""
    with pytest.raises((Mismatch, Malformed)):
        verify(BODY, TIMESTAMP, flip(SIGNATURE.encode(), bit).decode("latin-1"), [SECRET], NOW)


@pytest.mark.parametrize("bit", range(len(TIMESTAMP) * 8))
def test_a_flipped_bit_of_the_timestamp_is_refused(bit: int) -> None:
    """Each single bit of the timestamp header counts: a replay cannot be given a new date."""
    with pytest.raises((Mismatch, Malformed)):
        verify(BODY, flip(TIMESTAMP.encode(), bit).decode("latin-1"), SIGNATURE, [SECRET], NOW)


@pytest.mark.parametrize("offset_s", [-300, -299.999, -1, 0, 0.5, 299.999, 300])
def test_the_window_includes_its_edges(offset_s: float) -> None:
    """A request 300 seconds old, or 300 seconds ahead of our clock, still counts."""
    verify(BODY, TIMESTAMP, SIGNATURE, [SECRET], NOW + timedelta(seconds=offset_s))


@pytest.mark.parametrize(("offset_s", "age_s"), [(301, 301), (-301, -301), (300.001, 300), (86_400, 86_400)])
def test_outside_the_window_is_stale(offset_s: float, age_s: int) -> None:
    """A right signature too far from our clock, either way, is refused as stale and says how old it is."""
    with pytest.raises(Stale) as refusal:
        verify(BODY, TIMESTAMP, SIGNATURE, [SECRET], NOW + timedelta(seconds=offset_s))
    assert (refusal.value.reason, refusal.value.age_s) == ("stale", age_s)


@given(timestamp=st.from_regex(r"[0-9]{1,12}", fullmatch=True))
@example("0")
@example("9" * 12)
def test_stale_is_only_said_of_what_is_rightly_signed(timestamp: str) -> None:
    """A forger does not turn up among the stale requests, whatever date he writes."""
    with pytest.raises(Mismatch):
        verify(BODY, timestamp, sign(BODY, timestamp, "a guess"), [SECRET], NOW)
    if abs(int(timestamp) - 1_700_000_000) > 300:
        with pytest.raises(Stale):
            verify(BODY, timestamp, sign(BODY, timestamp), [SECRET], NOW)


def test_the_window_is_the_callers_to_widen() -> None:
    """A wider window lets in a late retry that was not signed anew."""
    verify(BODY, TIMESTAMP, SIGNATURE, [SECRET], NOW + timedelta(hours=1), tolerance_s=3_600)


def test_the_clock_may_stand_in_any_zone() -> None:
    """Only the instant counts, not the zone it is written in."""
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
def test_nothing_a_sender_can_send_raises_anything_else(
    body: bytes, timestamp: str | None, given_signature: str | None, secrets: list[str]
) -> None:
    """Whatever the body and the headers are, a request is refused with a reason and by no other exception."""
    with pytest.raises(SignatureRefused) as refusal:
        verify(body, timestamp, given_signature, secrets, NOW)
    assert refusal.value.reason in {"no_secret", "missing", "malformed", "mismatch", "stale"}


@pytest.mark.parametrize(
    ("timestamp", "given_signature"),
    [("170000000A", SIGNATURE), (TIMESTAMP, "secretive" + SIGNATURE), (TIMESTAMP, sign(b"other"))],
)
def test_a_refusal_repeats_nothing_it_was_given(timestamp: str, given_signature: str) -> None:
    """The refusal's text is safe in a log: no secret, and nothing the sender chose."""
    with pytest.raises(SignatureRefused) as refusal:
        verify(BODY, timestamp, given_signature, [SECRET], NOW)
    assert not any(text in str(refusal.value) for text in (SECRET, timestamp, given_signature))


def test_every_comparison_is_made_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each secret costs one compare_digest, also after one has matched."""
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


def test_one_string_for_the_list_of_secrets_is_a_mistake() -> None:
    """A lone string would make each of its letters a secret, so the caller is told."""
    with pytest.raises(TypeError, match="list of secrets"):
        verify(BODY, TIMESTAMP, sign(BODY, secret="t"), SECRET, NOW)


def test_a_clock_without_a_zone_is_a_mistake() -> None:
    """A naive time would be read in the machine's zone, so the caller is told."""
    with pytest.raises(ValueError, match="time zone"):
        verify(BODY, TIMESTAMP, SIGNATURE, [SECRET], NOW.replace(tzinfo=None))


def flip(data: bytes, bit: int) -> bytes:
    flipped = bytearray(data)
    flipped[bit // 8] ^= 1 << bit % 8
    return bytes(flipped)
