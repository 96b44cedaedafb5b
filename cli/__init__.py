"""The command `payready`."""
