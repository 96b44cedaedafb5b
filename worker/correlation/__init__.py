"""Where payments and balances meet: Redis. All that is in it can be lost, and is then had again from the ledger."""
