"""The webhook endpoint: verifies, parses and commits the provider's deliveries."""
