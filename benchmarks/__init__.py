"""Figures: `make bench`, and payready beside its peers."""
