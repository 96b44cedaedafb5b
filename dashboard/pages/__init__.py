"""The pages. Each module has its routes, reads what it needs in one snapshot of the ledger, and renders a template."""
