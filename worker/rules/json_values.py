"""Values of JSON, of jobs from different senders."""

from typing import Any


def is_same_json(left: Any, right: Any) -> bool:
    """Whether two values are the same in JSON. For Python `True == 1`, for JSON it is not.

    JSON has one type of number, so 1 and 1.0 are the same: a sender in JavaScript writes both as 1.
    """
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(is_same_json(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return len(left) == len(right) and all(map(is_same_json, left, right))
    return bool(left == right)
