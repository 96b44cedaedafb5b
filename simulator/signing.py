"""Quiltt's webhook signature. Pure."""

from __future__ import annotations

import base64
import hashlib
import hmac

_VERSION = b"1"


def sign(secret: str, timestamp: str, body: bytes) -> str:
    """The value of `Quiltt-Signature` for a body sent with this `Quiltt-Timestamp` (Unix seconds)."""
    signed = _VERSION + timestamp.encode() + body
    return base64.b64encode(hmac.digest(secret.encode(), signed, hashlib.sha256)).decode()
