"""A stand-in for Quiltt in a process of its own.

It knows payready only by HTTP: it answers the provider's endpoints, sends signed webhooks, misbehaves as the account
id asks (`scenarios.py`), and keeps a complete log of calls and deliveries, to be asked who is right (`log.py`).
"""
