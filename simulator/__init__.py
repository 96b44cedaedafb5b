"""Simulator of Quiltt, in its own process.

It communicates with payready over HTTP only. It serves the provider's endpoints and sends signed webhooks.
The account id selects the fault to simulate (`scenarios.py`). The simulator records every call and every delivery
attempt (`request_log.py`), so that tests can check what payready did. Accounts may have a true balance at a bank
(`bank.py`), which tests debit.
"""
