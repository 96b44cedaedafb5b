"""The truth, in SQL: payments, the tasks that wait for them, refreshes, fees and balances."""
