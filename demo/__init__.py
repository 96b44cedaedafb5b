"""The stack on one machine, and the demo: its jobs, its checks and a sample payments service."""
