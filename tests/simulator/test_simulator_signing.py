from simulator.signing import sign

BODY = b'{"eventTypes":["balance.created"]}'


def test_published_check_vector() -> None:
    """The signature of the provider's check vector is reproduced."""
    assert sign("test_secret", "1700000000", BODY) == "4V13r7evvdfLlNjoAUr3jO/ScGtoiUAKmmgEEL1GQ/k="


def test_signature_depends_on_secret_timestamp_and_body() -> None:
    """Another secret, another second or another byte gives another signature."""
    variants = [("test_secret", "1700000000", BODY), ("test_secreT", "1700000000", BODY)]
    variants += [("test_secret", "1700000001", BODY), ("test_secret", "1700000000", BODY + b" ")]
    assert len({sign(*variant) for variant in variants}) == len(variants)
