"""Password hashes: Argon2id. Each verification takes about 0.1 s of one core and 64 MiB, so that guessing is slow."""

import re

from argon2 import PasswordHasher
from argon2.exceptions import Argon2Error, InvalidHashError

MIN_PASSWORD_CHARS = 12
_HASHER = PasswordHasher(time_cost=3, memory_cost=65_536, parallelism=1)
_FORM = re.compile(r"\$argon2id\$v=19\$m=(\d{1,7}),t=(\d{1,2}),p=(\d{1,2})\$[A-Za-z0-9+/]{11,86}\$[A-Za-z0-9+/]{22,86}")
_MIN_MEMORY_KIB, _MAX_MEMORY_KIB = 19_456, 262_144
_MAX_ITERATIONS, _MAX_LANES = 10, 8
"""Bounds of accepted hashes: a weaker one is guessed fast, a costlier one occupies the process at each login."""


def hash_password(password: str) -> str:
    """Return the hash of a password, with a random salt."""
    return _HASHER.hash(_as_bytes(password))


def is_acceptable_hash(text: str) -> bool:
    """Return whether this is an Argon2id hash whose cost is within the bounds."""
    match = _FORM.fullmatch(text)
    if match is None:
        return False
    memory_kib, iterations, lanes = map(int, match.groups())
    return (
        _MIN_MEMORY_KIB <= memory_kib <= _MAX_MEMORY_KIB
        and 1 <= iterations <= _MAX_ITERATIONS
        and 1 <= lanes <= _MAX_LANES
    )


def verify_password(password_hash: str, password: str) -> bool:
    """Return whether the hash is that of the password."""
    try:
        return _HASHER.verify(password_hash, _as_bytes(password))
    except (Argon2Error, InvalidHashError):
        return False


def _as_bytes(password: str) -> bytes:
    return password.encode(errors="replace")
