"""What the provider tells us, over HTTP."""
