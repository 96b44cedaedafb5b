"""The ledger: all SQL. The source of truth."""
