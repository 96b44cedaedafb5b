"""Control endpoints of the bank: set true balances, debit and credit them, read the debits. Quiltt has none of them."""

import time

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from simulator.bank import Bank, BankSettings, UnknownBankAccount, debit_as_json
from simulator.request_validation import (
    FieldParsers,
    InvalidControlRequest,
    balance_time,
    decimal_amount,
    parse_fields,
    parse_fields_by_key,
    positive_amount,
    seconds,
    text,
)

_ACCOUNT_FIELDS: FieldParsers = {
    "balance": decimal_amount,
    "balance_time": balance_time,
    "max_late_s": seconds,
}
_DEBIT_FIELDS: FieldParsers = {"payment_id": text, "amount": positive_amount}
_CREDIT_FIELDS: FieldParsers = {"amount": positive_amount}


class BankApi:
    """Handlers of the bank's endpoints."""

    def __init__(self, bank: Bank) -> None:
        self._bank = bank

    def routes(self) -> list[Route]:
        """Return the bank's endpoints."""
        return [
            Route("/control/bank", self.get_balances_and_debits),
            Route("/control/bank", self.open_accounts, methods=["PUT"]),
            Route("/control/bank/{account_id}/debit", self.debit_once, methods=["POST"]),
            Route("/control/bank/{account_id}/credit", self.credit, methods=["POST"]),
        ]

    async def get_balances_and_debits(self, _: Request) -> Response:
        """Return the true balances, and all debits with whether they were paid."""
        return JSONResponse(self._bank.as_json())

    async def open_accounts(self, request: Request) -> Response:
        """Set the true balances of the accounts in the body, which is an object of settings by account id."""
        by_account = parse_fields_by_key(await request.body(), _ACCOUNT_FIELDS)
        if missing := sorted(account_id for account_id, fields in by_account.items() if "balance" not in fields):
            raise InvalidControlRequest(f"balance: missing for {missing[0]}")
        settings = {account_id: BankSettings(**fields) for account_id, fields in by_account.items()}
        self._bank.open_accounts(settings, time.time())
        return JSONResponse({"accounts": len(settings)})

    async def debit_once(self, request: Request) -> Response:
        """Debit a payment, once for each payment id. Return whether the bank paid."""
        fields = parse_fields(await request.body(), _DEBIT_FIELDS, required=True)
        account_id = request.path_params["account_id"]
        try:
            debit = self._bank.debit_once(fields["payment_id"], account_id, fields["amount"], time.time())
        except UnknownBankAccount as error:
            raise _unknown_account(account_id) from error
        return JSONResponse(debit_as_json(debit))

    async def credit(self, request: Request) -> Response:
        """Add an amount to the true balance. Return the new balance."""
        fields = parse_fields(await request.body(), _CREDIT_FIELDS, required=True)
        account_id = request.path_params["account_id"]
        try:
            balance = self._bank.credit(account_id, fields["amount"], time.time())
        except UnknownBankAccount as error:
            raise _unknown_account(account_id) from error
        return JSONResponse({"balance": str(balance)})


def _unknown_account(account_id: str) -> InvalidControlRequest:
    return InvalidControlRequest(f"{account_id}: has no true balance; set it with PUT /control/bank")
