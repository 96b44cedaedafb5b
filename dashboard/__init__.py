"""The role `dashboard`: pages for support, operators and finance. It reads the ledger, and its operators act on it."""
