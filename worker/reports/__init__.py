"""What the ledger says, for people: statements and reconciliations as rows, CSV and HTML, the same for each reader."""
