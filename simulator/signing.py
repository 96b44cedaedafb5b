"""Webhook signature of Quiltt. Pure function."""

import base64
import hashlib
import hmac

_VERSION = b"1"


def sign(secret: str, timestamp: str, body: bytes) -> str:
    """Return the `Quiltt-Signature` of a body that is sent with this `Quiltt-Timestamp` (Unix seconds)."""
    signed = _VERSION + timestamp.encode() + body
    return base64.b64encode(hmac.digest(secret.encode(), signed, hashlib.sha256)).decode()
