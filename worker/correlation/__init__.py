"""The correlation store and admission control, in Redis. All of it may be lost and is rebuilt from the ledger."""
