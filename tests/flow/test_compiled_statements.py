"""Compiled statements are kept for ever, so there is a fixed number of them."""

from tests.support.in_process import InProcessSystem
from worker.ledger.compiled_statements import compile_once


def test_payments_compile_no_statement_of_their_own(payready: InProcessSystem) -> None:
    """Neither more payments nor more accounts do."""
    compiled = []
    for number, accounts in enumerate((1, 3, 7)):
        for account in range(accounts):
            for payment in range(accounts):
                payready.initiate(f"p{number}x{account}x{payment}", f"acct_{number}x{account}", amount="5.00")
        payready.run_tasks()
        for account in range(accounts):
            payready.balance(f"acct_{number}x{account}")
        payready.run_tasks()
        assert payready.state_or_reason(f"p{number}x0x0") == "released"
        compiled.append(compile_once.cache_info().misses)
    assert compiled[1] == compiled[2]
